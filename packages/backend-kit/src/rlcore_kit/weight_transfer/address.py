"""The network address of a weight sender."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Address:
    """Address of a sender: plain data that `open_receiver` takes in other processes.

    Attributes:
        host: IP address or name on which the sender listens.
        port: TCP port on which the sender listens.
        receivers: number of receivers that the sender waits for.
        timeout_s: timeout of the sender, in seconds; the default of receivers.
        token: secret that a receiver presents to be accepted; keep it confidential.
    """

    host: str
    port: int
    receivers: int
    timeout_s: float
    token: str = field(repr=False)
