"""Load balancing of requests over replicas: bookkeeping without threads, clocks or engines."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass
class _Running:
    replica: int
    cost: int


class Balance:
    """Assigns requests to replicas by outstanding tokens, and all requests of a group to one replica.

    A request costs its prompt plus its maximum number of new tokens. It goes to the replica with the fewest outstanding
    tokens, except that a group stays on its replica (whose cached prefix serves it) until that replica has more
    outstanding tokens than the least loaded one by over ``slack`` such requests. The group then moves.

    Args:
        slack: number of requests by whose cost a group's replica may be ahead.
        max_groups: maximum number of groups whose replica is remembered; the least recently used are forgotten first.
    """

    def __init__(self, slack: float = 16, max_groups: int = 100_000) -> None:
        self._slack, self._max_groups = slack, max_groups
        self._load: dict[int, int] = {}
        self._running: dict[Hashable, _Running] = {}
        self._homes: OrderedDict[int, int] = OrderedDict()

    @property
    def replicas(self) -> tuple[int, ...]:
        """Replicas that take requests."""
        return tuple(self._load)

    def load(self, replica: int) -> int:
        """Return the outstanding tokens of ``replica``."""
        return self._load[replica]

    def add(self, replica: int) -> None:
        """Route requests to ``replica`` too."""
        self._load.setdefault(replica, 0)

    def remove(self, replica: int) -> list[Hashable]:
        """Stop routing to ``replica``; return the keys of its unfinished requests, which are now unassigned."""
        if self._load.pop(replica, None) is None:
            return []
        orphans = [key for key, running in self._running.items() if running.replica == replica]
        for key in orphans:
            del self._running[key]
        self._homes = OrderedDict((group, home) for group, home in self._homes.items() if home != replica)
        return orphans

    def assign(self, key: Hashable, cost: int, group: int | None = None) -> int | None:
        """Assign the request ``key`` of ``cost`` tokens to a replica and return it; None if there is no replica.

        The tokens count as outstanding until `finish`.
        """
        if not self._load:
            return None
        least = min(self._load, key=lambda replica: (self._load[replica], replica))
        chosen = least
        if group is not None:
            home = self._homes.get(group)
            if home is not None and self._load[home] - self._load[least] <= self._slack * cost:
                chosen = home
            self._homes[group] = chosen
            self._homes.move_to_end(group)
            if len(self._homes) > self._max_groups:
                self._homes.popitem(last=False)
        self._load[chosen] += cost
        self._running[key] = _Running(chosen, cost)
        return chosen

    def finish(self, key: Hashable) -> None:
        """Stop counting the request ``key``; nothing happens if its replica was removed."""
        running = self._running.pop(key, None)
        if running is not None:
            self._load[running.replica] -= running.cost

    def forget_groups(self) -> None:
        """Forget the replicas of all groups; an update of the weights discards their cached prefixes."""
        self._homes.clear()
