"""verifiers' event loop, in a thread: its servers and clients belong to one loop for as long as they live."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from rlcore.boundary import boundary
from rlcore.errors import EngineError

if TYPE_CHECKING:
    from verifiers.v1 import Env

T = TypeVar("T")
CLOSE_TIMEOUT_S = 30


class ServingLoop:
    """Runs coroutines while ``env`` serves what its episodes share: tool servers, and the proxy of model calls.

    Raises:
        EngineError: the environment cannot be started.
    """

    def __init__(self, env: Env[Any]) -> None:
        self._env = env
        self._loop = asyncio.new_event_loop()
        self._started: Future[None] = Future()
        self._stop = asyncio.Event()
        self._running: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="verifiers", daemon=True)
        self._thread.start()
        with boundary(f"the environment {env.config.env_id} cannot be started", EngineError):
            self._started.result()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``coroutine`` in the loop; cancelling the result cancels it."""
        return asyncio.run_coroutine_threadsafe(self._tracked(coroutine), self._loop)

    def close(self) -> None:
        """Cancel what runs, and stop what the environment serves."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CLOSE_TIMEOUT_S)

    async def _tracked(self, coroutine: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await coroutine
        finally:
            self._running.discard(task)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        try:
            async with self._env.serving():
                self._started.set_result(None)
                await self._stop.wait()
                for task in self._running:
                    task.cancel()
                await asyncio.gather(*self._running, return_exceptions=True)
        except Exception as error:
            if self._started.done():
                raise
            self._started.set_exception(error)
