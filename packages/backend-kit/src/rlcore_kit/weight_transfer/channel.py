"""Control messages between a sender and its receivers: JSON lines with a length in front, over TCP.

Nothing here is a pickle. A peer that dies closes its end, so whoever waits for it learns of it at once; one that hangs
is named when the time is over.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from rlcore.errors import WorkerError

Message = dict[str, Any]

_HEADER = struct.Struct("!I")
# Far above what a bucket of a hundred thousand tensors takes, and above the first words of a peer not known yet.
MOST_BYTES = 256 << 20
_MOST_BYTES_OF_A_STRANGER = 1 << 16


class TransferError(WorkerError):
    """A weight transfer failed; the connection is closed, and a new one can be opened.

    Attributes:
        receivers: ranks of the receivers whose fault it was, as far as is known.
    """

    def __init__(self, message: str, receivers: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.receivers = tuple(receivers)


class Channel:
    """One end of a connection.

    Attributes:
        peer: who is at the other end, for messages.
        rank: the receiver's rank, at the sender's end.
        most_bytes: longest message taken; small until the peer has shown that it was invited.
    """

    def __init__(self, connection: socket.socket, peer: str, rank: int | None = None) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._received = bytearray()
        self._inbox: deque[Message] = deque()
        self.peer = peer
        self.rank = rank
        self.most_bytes = _MOST_BYTES_OF_A_STRANGER

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Message, timeout_s: float) -> None:
        """Send one message.

        Raises:
            TransferError: the peer is gone, or takes nothing.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(_HEADER.pack(len(data)) + data)
        except TimeoutError:
            raise self.failure(f"{self.peer} took no message within {timeout_s:g} s") from None
        except OSError as error:
            self.look("take a message")  # it may have said why it left
            raise self.failure(f"{self.peer} closed the connection ({error})") from None

    def receive(self, timeout_s: float, awaited: str) -> Message:
        """The next message.

        Args:
            awaited: what the peer should do, as in "{peer} did not {awaited} within 60 s".

        Raises:
            TransferError: the peer is gone, reported a failure, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._inbox:
            left = deadline - time.monotonic()
            if left <= 0 or not _readable([self], left):
                raise self.failure(f"{self.peer} did not {awaited} within {timeout_s:g} s")
            self.look(awaited)
        return self._inbox.popleft()

    def look(self, awaited: str) -> None:
        """Take in what has come, without waiting for more.

        Raises:
            TransferError: the peer is gone, or reported a failure.
        """
        closed = self._read_what_came()
        for message in self._inbox:
            if "failed" in message:
                raise self.failure(f"{self.peer} failed: {message['failed']}")
        if closed and not self._inbox:
            raise self.failure(f"{self.peer} closed the connection (its process died?); it had to {awaited}")

    def failure(self, text: str) -> TransferError:
        return TransferError(text, () if self.rank is None else (self.rank,))

    def close(self) -> None:
        self._connection.close()

    def _read_what_came(self) -> bool:
        """True if the peer has closed its end."""
        closed = False
        self._connection.setblocking(False)
        try:
            while data := self._connection.recv(1 << 20):
                self._received += data
            closed = True
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        while len(self._received) >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._received)
            if size <= self.most_bytes and len(self._received) < _HEADER.size + size:
                break
            try:
                if size > self.most_bytes:
                    raise ValueError(size)
                message = json.loads(self._received[_HEADER.size : _HEADER.size + size])
                if not isinstance(message, dict):
                    raise ValueError(message)
            except ValueError:
                raise self.failure(f"{self.peer} sent something that is no message of ours") from None
            self._inbox.append(message)
            del self._received[: _HEADER.size + size]
        return closed


def gather(channels: Sequence[Channel], timeout_s: float, awaited: str) -> list[Message]:
    """The next message of every channel.

    Raises:
        TransferError: names the first that is gone or failed, or all that did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    answers: dict[int, Message] = {}
    while len(answers) < len(channels):
        waiting = [index for index in range(len(channels)) if index not in answers]
        for index in waiting:
            if channels[index]._inbox:
                answers[index] = channels[index]._inbox.popleft()
        waiting = [index for index in waiting if index not in answers]
        if not waiting:
            break
        left = deadline - time.monotonic()
        ready = _readable([channels[index] for index in waiting], left) if left > 0 else []
        if not ready:
            raise TransferError(
                f"{_names([channels[index].peer for index in waiting])} did not {awaited} within {timeout_s:g} s",
                [rank for index in waiting if (rank := channels[index].rank) is not None],
            )
        for channel in ready:
            channel.look(awaited)
    return [answers[index] for index in range(len(channels))]


def wait_until(done: Callable[[], bool], channels: Sequence[Channel], timeout_s: float, awaited: str) -> None:
    """Wait for something that cannot be selected on, while the peers are watched.

    Raises:
        TransferError: a peer is gone or failed, or it took longer than ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.0002
    silent = list(channels)  # a peer that has spoken already would be readable all the time
    while not done():
        if time.monotonic() > deadline:
            raise TransferError(
                f"{_names([channel.peer for channel in silent or channels])} did not {awaited} within {timeout_s:g} s",
                [rank for channel in silent or channels if (rank := channel.rank) is not None],
            )
        for channel in _readable(silent, pause):
            channel.look(awaited)
            silent.remove(channel)
        if not silent:
            time.sleep(pause)
        pause = min(pause * 2, 0.01)


def _readable(channels: Sequence[Channel], timeout_s: float) -> list[Channel]:
    poll = select.poll()  # select() refuses file descriptors above 1023
    by_descriptor = {channel.fileno(): channel for channel in channels}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(timeout_s * 1000)]


def _names(peers: Sequence[str]) -> str:
    return " and ".join(peers)
