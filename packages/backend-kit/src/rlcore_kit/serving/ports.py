"""Ports for servers that open their port themselves, some time after it was chosen."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 20_000  # Ray's workers listen on ports from 10,002 to 19,999
_TRIES = 100


def unused_port() -> int:
    """Return a TCP port that nothing on this machine listens at.

    The port is below the range from which the kernel takes ports for connections and for ``bind`` to port 0, so that
    no other process is given it before the server has opened it. Where that range leaves no room, it is one of it.
    """
    choice = random.SystemRandom()  # independent of the seeds of a run, and different in forked processes
    end = _first_ephemeral()
    for _ in range(_TRIES if end > _FIRST + _TRIES else 0):
        port = choice.randrange(_FIRST, end)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _first_ephemeral() -> int:
    """Return the first port that the kernel gives to connections; 0 if the system does not say it."""
    try:
        return int(_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0
