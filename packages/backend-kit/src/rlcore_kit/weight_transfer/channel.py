"""Control messages between a sender and its receivers: JSON objects with a length prefix, over TCP.

No message is a pickle. A peer that dies closes its connection, which the waiting process notices immediately; a peer
that hangs is named when the timeout expires.
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
# Limits on the length of a message: far above that of a bucket of 100,000 tensors, and that of the first message.
MAX_MESSAGE_BYTES = 256 << 20
_MAX_HELLO_BYTES = 1 << 16


class TransferError(WorkerError):
    """A weight transfer failed. The connection is closed; a new one can be opened.

    Attributes:
        receivers: ranks of the receivers that caused the failure, as far as they are known.
    """

    def __init__(self, message: str, receivers: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.receivers = tuple(receivers)


class Channel:
    """One end of a control connection.

    Attributes:
        peer: name of the process at the other end, for error messages.
        rank: rank of the receiver, at the sender's end.
        max_message_bytes: maximum length of a message; small until the peer has presented the token.
    """

    def __init__(self, connection: socket.socket, peer: str, rank: int | None = None) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._received = bytearray()
        self._inbox: deque[Message] = deque()
        self.peer = peer
        self.rank = rank
        self.max_message_bytes = _MAX_HELLO_BYTES

    def fileno(self) -> int:
        """Return the file descriptor of the connection."""
        return self._connection.fileno()

    def send(self, message: Message, timeout_s: float) -> None:
        """Send one message.

        Raises:
            TransferError: the peer closed the connection, or did not read the message within ``timeout_s``.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(_HEADER.pack(len(data)) + data)
        except TimeoutError:
            raise self.failure(f"{self.peer} did not accept a message within {timeout_s:g} s") from None
        except OSError as error:
            self.read_available("accept a message")  # the peer may have reported a reason
            raise self.failure(f"{self.peer} closed the connection ({error})") from None

    def receive(self, timeout_s: float, awaited: str) -> Message:
        """Return the next message.

        Args:
            awaited: expected action of the peer, as in "{peer} did not {awaited} within 60 s".

        Raises:
            TransferError: the peer closed the connection, reported a failure, or did not answer within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while not self._inbox:
            left = deadline - time.monotonic()
            if left <= 0 or not _readable([self], left):
                raise self.failure(f"{self.peer} did not {awaited} within {timeout_s:g} s")
            self.read_available(awaited)
        return self._inbox.popleft()

    def read_available(self, awaited: str) -> None:
        """Read the messages that have arrived, without waiting.

        Raises:
            TransferError: the peer closed the connection, or reported a failure.
        """
        closed = self._read()
        for message in self._inbox:
            if "failed" in message:
                raise self.failure(f"{self.peer} failed: {message['failed']}")
        if closed and not self._inbox:
            raise self.failure(
                f"{self.peer} closed the connection (its process died?); this process was waiting for it to {awaited}"
            )

    def failure(self, text: str) -> TransferError:
        """Make the error ``text`` that names this channel's receiver."""
        return TransferError(text, () if self.rank is None else (self.rank,))

    def pop(self) -> Message | None:
        """Return the oldest message that has been read and not returned, or None."""
        return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _read(self) -> bool:
        """Read what has arrived; return True if the peer has closed the connection."""
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
            if size <= self.max_message_bytes and len(self._received) < _HEADER.size + size:
                break
            try:
                if size > self.max_message_bytes:
                    raise ValueError(size)
                message = json.loads(self._received[_HEADER.size : _HEADER.size + size])
                if not isinstance(message, dict):
                    raise ValueError(message)
            except ValueError:
                raise self.failure(f"{self.peer} sent data that is not a message of the weight transfer") from None
            self._inbox.append(message)
            del self._received[: _HEADER.size + size]
        return closed


def gather(channels: Sequence[Channel], timeout_s: float, awaited: str) -> list[Message]:
    """Return the next message of every channel.

    Raises:
        TransferError: names the first peer that closed its connection or failed, or all peers that did not answer
            within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    answers: dict[int, Message] = {}
    while len(answers) < len(channels):
        waiting = [index for index in range(len(channels)) if index not in answers]
        for index in waiting:
            if (message := channels[index].pop()) is not None:
                answers[index] = message
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
            channel.read_available(awaited)
    return [answers[index] for index in range(len(channels))]


def wait_until(done: Callable[[], bool], channels: Sequence[Channel], timeout_s: float, awaited: str) -> None:
    """Wait for ``done`` by polling, while the connections of the peers are watched.

    Raises:
        TransferError: a peer closed its connection or failed, or ``timeout_s`` expired.
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.0002
    silent = list(channels)  # a channel with unread data would be readable all the time
    while not done():
        if time.monotonic() > deadline:
            raise TransferError(
                f"{_names([channel.peer for channel in silent or channels])} did not {awaited} within {timeout_s:g} s",
                [rank for channel in silent or channels if (rank := channel.rank) is not None],
            )
        for channel in _readable(silent, pause):
            channel.read_available(awaited)
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
