"""vLLM's asynchronous engine: scheduler and workers in separate processes, requests from a thread of this one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import psutil

from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_vllm import quirks
from rlcore_vllm.adapters import adapter_request
from rlcore_vllm.backend import CLOSED, Done, called
from rlcore_vllm.startup import noting_reasons

T = TypeVar("T")

DIED = "the vLLM engine's process died; what it printed says why"
POLL_S = 1.0
"""Seconds between two looks whether the process lives, while a call waits for it."""
CONTROL_TIMEOUT_S = 120
"""Timeout of calls that take no longer than a step."""


class SeparateProcess:
    """A `Backend` over ``AsyncLLM``, whose event loop runs on a thread of this process."""

    local = False

    def __init__(self, arguments: dict[str, Any], start_timeout_s: float) -> None:
        self._timeout_s = max(CONTROL_TIMEOUT_S, start_timeout_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vllm-client", daemon=True)
        self._requests: set[asyncio.Task[None]] = set()
        self._engine: Any = None
        self._closed = False
        self._thread.start()
        before = set(psutil.Process().children(recursive=True))
        try:
            with quirks.undisturbed(), noting_reasons(arguments) as (noting, reason):
                try:
                    self._engine = self._wait(self._start(noting), start_timeout_s, "start")
                except (EngineError, WorkerError) as error:
                    raise EngineError(f"vLLM cannot start: {reason() or quirks.root_reason(error)}") from error
        except BaseException:
            for process in set(psutil.Process().children(recursive=True)) - before:
                _kill(process)
            self.close(kill=True)
            raise
        self.config = self._engine.vllm_config
        self._adapter = adapter_request(self.config)
        self.workers = self.config.parallel_config.world_size

    @property
    def failure(self) -> WorkerError | None:
        """Why the engine cannot be used any more; None while it can."""
        return WorkerDied(DIED) if self._engine is not None and self._engine.errored else None

    def submit(self, key: str, prompt: list[int], params: Any, priority: int, done: Done) -> None:
        """See `Backend.submit`."""
        if self._closed:
            raise EngineError(CLOSED)
        self._loop.call_soon_threadsafe(self._begin, key, prompt, params, priority, done)

    def abort(self, keys: list[str]) -> None:
        """See `Backend.abort`."""
        self._wait(self._engine.abort(keys), self._timeout_s, "abort requests")

    def pause(self) -> None:
        """See `Backend.pause`."""
        self._wait(self._engine.pause_generation(mode="keep", clear_cache=False), self._timeout_s, "pause")

    def resume(self) -> None:
        """See `Backend.resume`."""
        self._wait(self._engine.resume_generation(), self._timeout_s, "resume")

    def forget_prefixes(self, version: int | None) -> None:
        """See `Backend.forget_prefixes`."""

        async def forget() -> None:
            await self._engine.reset_prefix_cache(reset_running_requests=True)
            if version is not None:
                await self._engine.update_weight_version(str(version))

        self._wait(forget(), self._timeout_s, "reset its prefix cache")

    def call_workers(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """See `Backend.call_workers`."""
        call = self._engine.collective_rpc(method, timeout=timeout_s, args=args)
        return list(self._wait(call, timeout_s + 10, called(method)))

    def sleep(self, level: int) -> None:
        """See `Backend.sleep`."""
        self._wait(self._engine.sleep(level, mode="keep"), self._timeout_s, "sleep")

    def wake(self, tags: list[str] | None) -> None:
        """See `Backend.wake`."""
        self._wait(self._engine.wake_up(tags), self._timeout_s, "wake")

    def probe(self, timeout_s: float) -> None:
        """See `Backend.probe`."""
        self._wait(self._engine.get_weight_version(), timeout_s, "answer")

    def close(self, *, kill: bool = False) -> None:
        """See `Backend.close`."""
        if self._closed:
            return
        self._closed = True
        engine, self._engine = self._engine, None
        if engine is not None:
            children = [psutil.Process(process.pid) for process in quirks.processes(engine) if process.is_alive()]
            family = [relative for child in children for relative in (child, *child.children(recursive=True))]
            if kill:
                for process in family:
                    _kill(process)
            with contextlib.suppress(EngineError, WorkerError):
                self._wait(self._end(engine), self._timeout_s, "shut down")
            _, alive = psutil.wait_procs(family, timeout=10)
            for process in alive:
                _kill(process)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    async def _start(self, arguments: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import Executor

        with quirks.no_worker_processes():
            config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
        return AsyncLLM(config, Executor.get_class(config), log_stats=False, log_requests=False)

    async def _end(self, engine: Any) -> None:
        engine.shutdown()
        if self._requests:
            await asyncio.wait(self._requests, timeout=10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    def _begin(self, key: str, prompt: list[int], params: Any, priority: int, done: Done) -> None:
        task = self._loop.create_task(self._request(key, prompt, params, priority, done))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _request(self, key: str, prompt: list[int], params: Any, priority: int, done: Done) -> None:
        from vllm.inputs import tokens_input

        outcome: Any = EngineError(CLOSED)
        try:
            if self._engine is not None:
                async for output in self._engine.generate(
                    tokens_input(prompt), params, key, lora_request=self._adapter, priority=priority
                ):
                    outcome = output
        except Exception as error:
            outcome = self.failure or EngineError(
                CLOSED if self._closed else f"vLLM refuses the request: {quirks.root_reason(error)}"
            )
        finally:
            done(outcome)

    def _wait(self, work: Coroutine[Any, Any, T], timeout_s: float, what: str) -> T:
        """Return the result of ``work``, which runs on the loop's thread.

        vLLM (0.32) waits for its process forever if that dies meanwhile, so the process is polled.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        deadline = time.monotonic() + timeout_s
        try:
            while not concurrent.futures.wait([future], min(POLL_S, max(deadline - time.monotonic(), 0))).done:
                if self.failure is not None:
                    future.cancel()
                    raise self.failure
                if time.monotonic() >= deadline:
                    future.cancel()
                    raise WorkerDied(f"the vLLM engine's process did not {what} within {timeout_s:g} s")
            return future.result()
        except (EngineError, WorkerError):
            raise
        except Exception as error:
            if self.failure is not None:
                raise self.failure from error
            raise EngineError(f"the vLLM engine's process failed to {what}: {quirks.one_line(error)}") from error


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
