"""One stream of buckets to several readers at the pace of the slowest, so that no more of it exists than for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from rlcore.engines.rollout import RolloutEngine
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import WorkerError
from rlcore_kit.serving.threaded_calls import ThreadedCall, failures_of


class StreamBroke(Exception):
    """The stream of weights failed, which is the trainer's fault, and what that did to the engines."""

    def __init__(self, error: Exception, failures: dict[int, Exception]) -> None:
        super().__init__(str(error))
        self.error, self.failures = error, failures


def update_all(
    engines: Mapping[int, tuple[str, RolloutEngine]], buckets: Iterable[WeightBucket], version: int, timeout_s: float
) -> dict[int, Exception]:
    """Have all ``engines``, each with a name for messages, take ``buckets`` as ``version``; what went wrong where.

    ``buckets`` are taken to their end in the caller's thread whatever happens.

    Args:
        timeout_s: longest wait for an engine or the stream; see `FanOut`.

    Raises:
        StreamBroke: ``buckets`` failed.
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
            fan_out.drop(key, "it was done")

    threads = {
        key: ThreadedCall(f"weights of {name}", partial(take, key, engine)) for key, (name, engine) in engines.items()
    }
    try:
        fan_out.feed(buckets)
    except Exception as error:
        raise StreamBroke(error, failures_of(threads, timeout_s, "give up the weights")) from error
    return failures_of(threads, timeout_s, "take the weights")


class FanOut:
    """Hands every bucket of a stream to every reader.

    The next bucket is taken from the stream when all readers have asked for it, so they are through with the one
    before. Readers run in threads of their own; `feed` runs where the stream must be consumed.

    Args:
        readers: names for messages, by the key that `reader` and `drop` take.
        timeout_s: longest wait for a reader to take a bucket, and for the stream to make one.
    """

    def __init__(self, readers: Mapping[int, str], timeout_s: float) -> None:
        self._names, self._timeout_s = dict(readers), timeout_s
        self._changed = threading.Condition()
        self._asked = dict.fromkeys(readers, 0)  # how many buckets each has asked for
        self._dropped: dict[int, str] = {}
        self._bucket: WeightBucket | None = None
        self._given = 0
        self._end: BaseException | bool = False

    def reader(self, key: int) -> Iterator[WeightBucket]:
        """The stream for one reader.

        Raises:
            WorkerError: the stream broke off, made no bucket in time, or this reader was dropped.
        """
        taken = 0
        while True:
            with self._changed:
                if key in self._asked:
                    self._asked[key] = taken + 1
                    self._changed.notify_all()
                # Twice: the slowest of the others may take its time before the stream does.
                fine = self._changed.wait_for(partial(self._ready, key, taken), 2 * self._timeout_s)
                if key in self._dropped:
                    raise WorkerError(f"{self._names[key]} was left behind: {self._dropped[key]}")
                if self._given > taken:
                    assert self._bucket is not None
                    bucket = self._bucket
                elif self._end is True:
                    return
                elif fine:
                    raise WorkerError(f"the stream of weights broke off: {self._end}")
                else:
                    raise WorkerError(f"no bucket {taken + 1} came within {2 * self._timeout_s:g} s")
            taken += 1
            yield bucket
            del bucket

    def _ready(self, key: int, taken: int) -> bool:
        return self._given > taken or self._end is not False or key in self._dropped

    def drop(self, key: int, reason: str) -> None:
        """Wait for this reader no longer."""
        with self._changed:
            if self._asked.pop(key, None) is not None:
                self._dropped[key] = reason
                self._changed.notify_all()

    def feed(self, buckets: Iterable[WeightBucket]) -> None:
        """Give all ``buckets`` to all readers, and take them to their end whatever becomes of the readers."""
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
