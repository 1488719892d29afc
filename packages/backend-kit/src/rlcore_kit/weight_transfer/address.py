"""Where a sender is found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Address:
    """Where a sender listens; plain data, to be given to `open_receiver` in other processes.

    Attributes:
        token: shows a receiver to be invited; keep it from others.
        timeout_s: the sender's, which receivers use too unless told otherwise.
    """

    host: str
    port: int
    receivers: int
    timeout_s: float
    token: str = field(repr=False)
