"""Rewards that run in a pool of worker processes, so that no sample can end the trainer.

Each thread of a small thread pool takes one worker and sends it one sample, within the limits of `RewardSettings`. A
worker that exceeds a limit, dies or sends an invalid reply is killed together with all processes that it started, and
its sample gets the error score; a new worker replaces it when one is needed. If the worker was ended by SIGKILL, which
usually comes from outside (a machine without free memory, an operator), the sample is scored once more.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_kit.worker.process import WorkerFailure
from rlcore_rewards.function_worker import FunctionWorker
from rlcore_rewards.reply import HARMLESS, decode
from rlcore_rewards.tally import Tally


class PooledReward(Reward):
    """Scores with a function in worker processes.

    The first worker starts immediately and reports a function that cannot be loaded; others start when calls overlap.

    Args:
        name: name of the reward in log messages.
        loader: ``module:attribute`` of a function that takes ``options`` and returns the function that scores a
            `RewardSample`. It is imported in the workers only.
        options: argument of the loader.
        settings: limits, number of workers and error score.

    Raises:
        WorkerFailure: the function cannot be loaded.
    """

    def __init__(self, name: str, loader: str, options: Mapping[str, Any], settings: RewardSettings) -> None:
        self._loader = loader
        self._options = options
        self._settings = settings
        self._tally = Tally(name, settings.error_score)
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix=f"reward-{name}")
        self._lock = Lock()
        self._workers: set[FunctionWorker] = set()
        self._owner = os.getpid()
        self._closed = False
        self._slowest_first: float | None = None
        self._idle = [self._start()]

    async def score(self, sample: RewardSample) -> RewardResult:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._score, sample)

    def stats(self) -> dict[str, int]:
        return self._tally.stats()

    def close(self) -> None:
        """End all workers; samples that are being scored fail."""
        if self._closed or os.getpid() != self._owner:  # a fork of the trainer does not own the workers
            return
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        while self._idle:
            self._kill(self._idle.pop())

    def _score(self, sample: RewardSample, again: bool = False) -> RewardResult:
        worker = None
        try:
            request = _pickle(sample)
            worker = self._borrow()
            result = decode(self._ask(worker, request))
        except WorkerFailure as failure:
            if worker and failure.kind in HARMLESS:
                self._idle.append(worker)
            elif worker:
                self._kill(worker)
            if failure.killed and not again:
                return self._score(sample, again=True)
            return self._tally.failed(failure.kind, str(failure))
        self._idle.append(worker)
        return self._tally.scored(result)

    def _ask(self, worker: FunctionWorker, request: bytes) -> bytes:
        """Return the worker's reply to a pickled sample, within the sample's timeout.

        The first call of a worker may import modules, so its timeout is ``startup_timeout_s``. After the first call of
        any worker was answered, it is ``timeout_s`` plus twice the time of the slowest first call: a sample that never
        ends must not cost each new worker the full start-up timeout.
        """
        seconds, limit = self._settings.timeout_s, f"timeout_s={self._settings.timeout_s:g}"
        if worker.answered:
            return worker.ask(request, seconds, limit)
        startup = self._settings.startup_timeout_s
        if self._slowest_first is None and startup > seconds:
            seconds, limit = startup, f"startup_timeout_s={startup:g} (the first call)"
        elif self._slowest_first is not None:
            seconds += 2 * self._slowest_first
            limit += f" and {2 * self._slowest_first:.3g} s for imports"
        start = time.monotonic()
        reply = worker.ask(request, seconds, limit)
        self._slowest_first = max(self._slowest_first or 0.0, time.monotonic() - start)
        return reply

    def _borrow(self) -> FunctionWorker:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return self._start()
            if worker.idle():
                return worker
            self._kill(worker)

    def _start(self) -> FunctionWorker:
        with self._lock:
            if self._closed:
                raise WorkerFailure("closed", "the reward was closed")
            try:
                worker = FunctionWorker(self._settings)
            except OSError as error:
                raise WorkerFailure("startup", f"a worker process cannot be started: {error}") from error
            self._workers.add(worker)
        try:
            worker.start(self._loader, self._options)
        except BaseException:
            self._kill(worker)
            raise
        return worker

    def _kill(self, worker: FunctionWorker) -> None:
        worker.kill()
        with self._lock:
            self._workers.discard(worker)


def _pickle(sample: RewardSample) -> bytes:
    try:
        return pickle.dumps(sample)
    except Exception as error:
        raise WorkerFailure("request", f"the sample cannot be pickled: {type(error).__name__}: {error}") from error
