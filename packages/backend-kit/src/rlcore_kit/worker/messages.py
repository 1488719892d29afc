"""Messages through pipes: bytes after their length."""

from __future__ import annotations

import struct
from typing import BinaryIO

LENGTH = struct.Struct("!I")


def read_message(incoming: BinaryIO) -> bytes:
    """Return the next message; b"" at the end of the pipe."""
    header = incoming.read(LENGTH.size)
    return incoming.read(LENGTH.unpack(header)[0]) if len(header) == LENGTH.size else b""


def write_message(outgoing: BinaryIO, message: bytes) -> None:
    """Write a message."""
    outgoing.write(LENGTH.pack(len(message)) + message)
    outgoing.flush()
