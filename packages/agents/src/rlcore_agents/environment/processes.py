"""Environments in worker processes: one that crashes or hangs is killed with all that it started, and replaced."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from threading import Lock
from typing import Any

from pydantic import TypeAdapter

from rlcore.engines.episode import PromptSample
from rlcore.errors import ConfigError
from rlcore_agents.conversation import Reply
from rlcore_agents.environment.exchange import EnvironmentFailure, Outcome, Request
from rlcore_agents.environment.settings import PythonEnvironmentSettings
from rlcore_kit.worker.process import WorkerFailure, WorkerLimits, WorkerProcess

MAX_MESSAGE = 64 << 20
"""Maximum bytes of a message from a worker: a whole conversation."""
MAX_OUTPUT_KB = 1 << 20
"""Maximum output of an environment between two messages, in KiB; it is read and dropped."""
MESSAGES: Mapping[str, TypeAdapter[Any]] = {"request": TypeAdapter(Request), "outcome": TypeAdapter(Outcome)}


class ProcessSession:
    """One episode's environment in a worker process."""

    def __init__(self, host: ProcessHost, worker: WorkerProcess, sample: PromptSample, seed: int) -> None:
        self._host = host
        self._worker = worker
        self._start: bytes | None = pickle.dumps((sample, seed))
        self._busy = False

    async def exchange(self, reply: Reply | None, seconds: float, limit: str) -> Request | Outcome:
        """Give the environment the reply to its request (at first None: begin) and return what it sends next.

        Raises:
            EnvironmentFailure: it did not answer in time, or its process ended; nothing of it is left.
        """
        message, self._start = (pickle.dumps(reply) if self._start is None else self._start), None
        self._busy = True
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._host.threads, self._exchange, message, seconds, limit)
        if isinstance(answer, Outcome):
            self._host.give_back(self._worker)
        return answer

    def cancel(self) -> None:
        """End the worker, if it is not dead yet."""
        if self._busy:
            self._worker.interrupt()  # the thread that waits for it kills it
        else:
            self._host.threads.submit(self._host.kill, self._worker)

    def _exchange(self, message: bytes, seconds: float, limit: str) -> Request | Outcome:
        try:
            [(kind, fields)] = json.loads(self._worker.exchange(message, seconds, limit)).items()
            self._busy = False
            answer: Request | Outcome = MESSAGES[kind].validate_python(fields)
            return answer
        except WorkerFailure as failure:
            self._host.kill(self._worker)
            raise EnvironmentFailure(str(failure)) from None
        except Exception as error:
            self._host.kill(self._worker)
            raise EnvironmentFailure(f"its process sent a malformed message ({type(error).__name__})") from None


class ProcessHost:
    """Starts sessions in at most ``processes`` worker processes, each of which plays one episode at a time.

    Raises:
        ConfigError: the class or function cannot be loaded or called.
    """

    def __init__(self, options: PythonEnvironmentSettings) -> None:
        self._options = options
        self.threads = ThreadPoolExecutor(options.processes, thread_name_prefix="environment")
        self._lock = Lock()
        self._free = options.processes
        self._waiting: deque[Future[None]] = deque()
        self._workers: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = [self._started()]

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the processes; it is started here, and its import takes none of the episode's time."""
        await self._acquire()
        try:
            await asyncio.get_running_loop().run_in_executor(self.threads, lambda: self._idle.append(self._borrow()))
            yield
        finally:
            self._release()

    async def open(self, sample: PromptSample, seed: int) -> ProcessSession:
        """Return a new session for an episode, within `slot`."""
        worker = await asyncio.get_running_loop().run_in_executor(self.threads, self._borrow)
        return ProcessSession(self, worker, sample, seed)

    async def stop(self, session: ProcessSession) -> None:
        """End a session that failed."""
        session.cancel()

    def give_back(self, worker: WorkerProcess) -> None:
        """Take back a worker whose episode has ended."""
        self._idle.append(worker)

    def kill(self, worker: WorkerProcess) -> None:
        """End a worker and everything that it started."""
        worker.kill()
        with self._lock:
            self._workers.discard(worker)

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            worker.interrupt()
        self.threads.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.kill()

    async def _acquire(self) -> None:
        """Wait for a free process; callers are in event loops of several threads."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn: Future[None] = Future()
            self._waiting.append(turn)
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._release()
            raise

    def _release(self) -> None:
        with self._lock:
            while self._waiting:
                turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(None)
                    return
            self._free += 1

    def _borrow(self) -> WorkerProcess:
        """Return a worker that is idle, or a new one."""
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return self._started()
            if worker.idle():
                return worker
            self.kill(worker)  # it has ended meanwhile

    def _started(self) -> WorkerProcess:
        options = self._options
        limits = WorkerLimits(
            options.memory_mb, options.max_processes, MAX_OUTPUT_KB, MAX_MESSAGE, options.pass_env, "the environment"
        )
        setup = pickle.dumps({"sys_path": sys.path, "options": options.model_dump(mode="json")})
        seconds = options.startup_timeout_s
        worker = WorkerProcess("rlcore_agents.environment.worker", limits)
        with self._lock:
            self._workers.add(worker)
        try:
            problem = json.loads(worker.exchange(setup, seconds, f"startup_timeout_s={seconds:g}"))["error"]
        except WorkerFailure as failure:
            problem = f"environment {options.path!r}: {failure}"
        if problem:
            self.kill(worker)
            raise ConfigError(problem)
        return worker
