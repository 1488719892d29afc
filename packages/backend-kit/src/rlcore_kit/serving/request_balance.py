"""Which replica takes which request: bookkeeping without threads, clocks or engines."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass
class _Running:
    replica: int
    cost: int


class Balance:
    """Requests over replicas, by outstanding tokens and with a group on one replica.

    A request costs its prompt plus the tokens that it may generate. It goes to the replica with the fewest outstanding
    tokens; but where a request of its group went before, unless that replica has more outstanding tokens than the least
    loaded one by over ``slack`` such requests. The group then moves.

    Args:
        slack: requests' worth of tokens that a group's replica may be ahead.
        most_groups: groups whose replica is remembered; the longest unused are forgotten first.
    """

    def __init__(self, slack: float = 16, most_groups: int = 100_000) -> None:
        self._slack, self._most_groups = slack, most_groups
        self._load: dict[int, int] = {}
        self._running: dict[Hashable, _Running] = {}
        self._homes: OrderedDict[int, int] = OrderedDict()

    @property
    def replicas(self) -> tuple[int, ...]:
        """Those that take requests."""
        return tuple(self._load)

    def load(self, replica: int) -> int:
        """Outstanding tokens of ``replica``."""
        return self._load[replica]

    def add(self, replica: int) -> None:
        """Let ``replica`` take requests."""
        self._load.setdefault(replica, 0)

    def remove(self, replica: int) -> list[Hashable]:
        """Give ``replica`` nothing any more; returns the keys of what it was at, which are assigned to nobody now."""
        if self._load.pop(replica, None) is None:
            return []
        orphans = [key for key, running in self._running.items() if running.replica == replica]
        for key in orphans:
            del self._running[key]
        self._homes = OrderedDict((group, home) for group, home in self._homes.items() if home != replica)
        return orphans

    def assign(self, key: Hashable, cost: int, group: int | None = None) -> int | None:
        """The replica for the request ``key`` of ``cost`` tokens, which counts as outstanding from now on.

        None if there is no replica.
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
            if len(self._homes) > self._most_groups:
                self._homes.popitem(last=False)
        self._load[chosen] += cost
        self._running[key] = _Running(chosen, cost)
        return chosen

    def finish(self, key: Hashable) -> None:
        """The request ``key`` is no longer outstanding; nothing happens if its replica was removed."""
        running = self._running.pop(key, None)
        if running is not None:
            self._load[running.replica] -= running.cost

    def forget_groups(self) -> None:
        """Groups have no replica any more, as after an update of the weights, when no prefix is cached."""
        self._homes.clear()
