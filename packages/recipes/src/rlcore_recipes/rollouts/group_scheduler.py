"""Bound the staleness of samples: decide which groups may be started, and which of them a step trains on.

A *group* is a prompt with its completions. Version *v* of the policy is the one after *v* steps, and step *t* trains
version *t* − 1. A group that is started under version *v* holds no token of an older one, so that it may be trained on
until step *v* + *k* + 1, its *deadline*. Two rules together keep every deadline:

- *Admission*: under version *v*, the groups of all steps so far and those that are started and not consumed number at
  most (*v* + *k* + 1) · batch. This is the most that the steps up to the new groups' deadline can consume.
- *Consumption*: a step takes what is most urgent of what is finished, and waits rather than take so many young groups
  that an older one, unfinished yet, would find the steps up to its deadline full. So in whatever order groups finish,
  for every *d* those with a deadline up to *d* that are left after step *t* fit into the (*d* − *t*) · batch places of
  the steps until then.

Without staleness (*k* = 0) this is synchronous training: a step's groups are started together, and all are awaited.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class GroupScheduler:
    """The groups between their start and the step that trains on them. Plain bookkeeping: no clock, no threads.

    Groups are known by a number, the position of their prompt.

    Args:
        batch: groups that one step trains on.
        max_staleness: *k* above.
        last_step: no groups are started that no step up to this one would need.
        taken: steps whose groups were taken already.
    """

    batch: int
    max_staleness: int
    last_step: int
    taken: int = 0
    _deadlines: dict[int, int] = field(default_factory=dict)
    _finished: set[int] = field(default_factory=set)

    @property
    def finished(self) -> int:
        """Groups that are finished and not taken."""
        return len(self._finished)

    @property
    def unfinished(self) -> int:
        """Groups that were started and are neither finished nor dropped."""
        return len(self._deadlines) - len(self._finished)

    def capacity(self, version: int) -> int:
        """Return the number of groups that may be started under ``version``."""
        until = min(version + self.max_staleness + 1, self.last_step)
        return until * self.batch - self.taken * self.batch - len(self._deadlines)

    def start(self, group: int, version: int) -> None:
        """Note that ``group`` is generated for, by ``version`` or a later one."""
        assert group not in self._deadlines
        assert self.capacity(version) > 0
        self._deadlines[group] = version + self.max_staleness + 1

    def finish(self, group: int) -> None:
        """Note that ``group`` may be trained on."""
        assert group in self._deadlines
        self._finished.add(group)

    def drop(self, group: int) -> None:
        """Forget ``group``, which no step will train on; another one may be started instead."""
        del self._deadlines[group]
        self._finished.discard(group)

    def take(self) -> list[int] | None:
        """Return the groups of the next step, in the order of their prompts; None if they are not finished yet."""
        step = self.taken + 1
        urgent = sorted(self._finished, key=lambda group: (self._deadlines[group], group))[: self.batch]
        left = Counter(self._deadlines.values()) - Counter(self._deadlines[group] for group in urgent)
        waiting = 0
        for deadline in sorted(left):
            waiting += left[deadline]
            if waiting > (deadline - step) * self.batch:
                return None  # an unfinished group would come too late: no other choice of finished ones is better
        if len(urgent) < self.batch:
            return None
        self.taken = step
        for group in urgent:
            self.drop(group)
        return sorted(urgent)
