"""Broadcast a stream of weight buckets to several readers in lockstep, so that memory stays that of one reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from rlcore.engines.rollout import RolloutEngine
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import WorkerError
from rlcore_kit.serving.threaded_calls import ThreadedCall, failures_of


class BrokenStream(Exception):
    """The trainer's stream of weights failed; holds its error, and the resulting failures of engines by key."""

    def __init__(self, error: Exception, failures: dict[int, Exception]) -> None:
        super().__init__(str(error))
        self.error, self.failures = error, failures


def update_all(
    engines: Mapping[int, tuple[str, RolloutEngine]], buckets: Iterable[WeightBucket], version: int, timeout_s: float
) -> dict[int, Exception]:
    """Update the weights of all ``engines``; return failures by key.

    ``buckets`` are consumed to the end in the caller's thread in any case.

    Args:
        engines: by key, each with a name for messages.
        timeout_s: timeout of an engine and of the stream; see `FanOut`.

    Raises:
        BrokenStream: ``buckets`` failed.
    """
    fan_out = FanOut({key: name for key, (name, _) in engines.items()}, timeout_s)

    def take(key: int, engine: RolloutEngine) -> None:
        try:
            stream = fan_out.reader(key)
            engine.update_weights(stream, version)
            for _ in stream:
                raise WorkerError(f"{type(engine).__name__}.update_weights did not take all buckets")
            if engine.version != version:
                raise WorkerError(f"it attests version {engine.version} after an update to {version}")
        finally:
            fan_out.drop(key, "it had finished")

    threads = {
        key: ThreadedCall(f"weights of {name}", partial(take, key, engine)) for key, (name, engine) in engines.items()
    }
    try:
        fan_out.feed(buckets)
    except Exception as error:
        raise BrokenStream(error, failures_of(threads, timeout_s, "give up the weights")) from error
    return failures_of(threads, timeout_s, "take the weights")


class FanOut:
    """Gives every bucket of a stream to every reader.

    The next bucket is taken from the stream when all readers have asked for it, and have therefore finished with the
    previous one. Readers run in separate threads; `feed` runs where the stream must be consumed.

    Args:
        readers: names for messages, by the key that `reader` and `drop` take.
        timeout_s: timeout for a reader to take a bucket, and for the stream to produce one.
    """

    def __init__(self, readers: Mapping[int, str], timeout_s: float) -> None:
        self._names, self._timeout_s = dict(readers), timeout_s
        self._changed = threading.Condition()
        self._asked = dict.fromkeys(readers, 0)  # number of buckets that each has asked for
        self._dropped: dict[int, str] = {}
        self._bucket: WeightBucket | None = None
        self._given = 0
        self._end: BaseException | bool = False

    def reader(self, key: int) -> Iterator[WeightBucket]:
        """Yield the buckets for one reader.

        Raises:
            WorkerError: the stream broke, produced no bucket in time, or this reader was dropped.
        """
        taken = 0
        while True:
            with self._changed:
                if key in self._asked:
                    self._asked[key] = taken + 1
                    self._changed.notify_all()
                # Twice the timeout: the slowest other reader may use one, and the stream another.
                arrived = self._changed.wait_for(partial(self._ready, key, taken), 2 * self._timeout_s)
                if key in self._dropped:
                    raise WorkerError(f"{self._names[key]} was dropped from the update: {self._dropped[key]}")
                if self._given > taken:
                    assert self._bucket is not None
                    bucket = self._bucket
                elif self._end is True:
                    return
                elif arrived:
                    raise WorkerError(f"the stream of weights broke: {self._end}")
                else:
                    raise WorkerError(f"bucket {taken + 1} did not arrive within {2 * self._timeout_s:g} s")
            taken += 1
            yield bucket
            del bucket

    def _ready(self, key: int, taken: int) -> bool:
        return self._given > taken or self._end is not False or key in self._dropped

    def drop(self, key: int, reason: str) -> None:
        """Stop waiting for a reader."""
        with self._changed:
            if self._asked.pop(key, None) is not None:
                self._dropped[key] = reason
                self._changed.notify_all()

    def feed(self, buckets: Iterable[WeightBucket]) -> None:
        """Give all ``buckets`` to all readers; consume them to the end even if every reader fails."""
        try:
            stream = iter(buckets)
            while True:
                self._wait_until_asked()
                with self._changed:
                    self._bucket = None
                bucket = next(stream, None)
                if bucket is None:
                    break
                with self._changed:
                    self._bucket = bucket
                    self._given += 1
                    self._changed.notify_all()
                del bucket
        except BaseException as error:
            self._finish(error)
            raise
        self._finish(True)

    def _finish(self, end: BaseException | bool) -> None:
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def _wait_until_asked(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while slow := [key for key, asked in self._asked.items() if asked <= self._given]:
                if not self._changed.wait(max(deadline - time.monotonic(), 0)) and time.monotonic() >= deadline:
                    for key in slow:
                        del self._asked[key]
                        self._dropped[key] = f"it did not take bucket {self._given} within {self._timeout_s:g} s"
                    self._changed.notify_all()
