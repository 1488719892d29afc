"""vLLM's synchronous engine on a thread of this process.

With tensor parallelism its workers are separate processes; scheduling stays in this one.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from rlcore.errors import EngineError, WorkerError
from rlcore_vllm import quirks
from rlcore_vllm.adapters import adapter_request
from rlcore_vllm.backend import CLOSED, Done, called
from rlcore_vllm.startup import noting_reasons

logger = logging.getLogger(__name__)
T = TypeVar("T")


class InProcess:
    """A `Backend` over ``LLMEngine``. All calls of vLLM are made on one thread, between two steps."""

    def __init__(self, arguments: dict[str, Any], start_timeout_s: float) -> None:
        self._timeout_s = start_timeout_s
        self._work: deque[Callable[[], None]] = deque()
        self._awake = threading.Condition()
        self._done: dict[str, Done] = {}
        self._outputs: list[tuple[str, Any]] = []
        self._paused = self._closing = False
        self._error: EngineError | WorkerError = EngineError(CLOSED)  # raised to requests after the engine ended
        self._engine: Any = None
        started: concurrent.futures.Future[Any] = concurrent.futures.Future()  # of vLLM's configuration
        self._thread = threading.Thread(target=self._run, args=(arguments, started), name="vllm", daemon=True)
        with quirks.undisturbed():
            self._thread.start()
            try:
                self.config = started.result(start_timeout_s)
            except TimeoutError:
                raise EngineError(f"vLLM did not start within {start_timeout_s:g} s (start_timeout_s)") from None
        self._adapter = adapter_request(self.config)
        self.workers = self.config.parallel_config.world_size
        self.local = self.workers == 1

    @property
    def failure(self) -> WorkerError | None:
        """Why the engine cannot be used any more; None while it can."""
        return self._error if isinstance(self._error, WorkerError) else None

    # --- from any thread ---------------------------------------------------------------------------------------------

    def submit(self, key: str, prompt: list[int], params: Any, priority: int, done: Done) -> None:
        """See `Backend.submit`."""
        self._enqueue(partial(self._add, key, prompt, params, priority, done))

    def abort(self, keys: list[str]) -> None:
        """See `Backend.abort`."""
        self._call(lambda: self._engine.abort_request(keys), "abort requests", self._timeout_s)

    def pause(self) -> None:
        """See `Backend.pause`."""
        self._call(partial(self._set_paused, True), "pause", self._timeout_s)

    def resume(self) -> None:
        """See `Backend.resume`."""
        self._call(partial(self._set_paused, False), "resume", self._timeout_s)

    def forget_prefixes(self, version: int | None) -> None:
        """See `Backend.forget_prefixes`."""

        def forget() -> None:
            self._engine.reset_prefix_cache(reset_running_requests=True)
            if version is not None:
                self._engine.set_weight_version(str(version))

        self._call(forget, "reset its prefix cache", self._timeout_s)

    def call_workers(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """See `Backend.call_workers`."""
        return self._call(
            lambda: list(self._engine.collective_rpc(method, timeout=timeout_s, args=args)),
            called(method),
            timeout_s + 10,
        )

    def sleep(self, level: int) -> None:
        """See `Backend.sleep`."""
        self._call(lambda: self._engine.sleep(level, mode="keep"), "sleep", self._timeout_s)

    def wake(self, tags: list[str] | None) -> None:
        """See `Backend.wake`."""
        self._call(lambda: self._engine.wake_up(tags), "wake", self._timeout_s)

    def probe(self, timeout_s: float) -> None:
        """See `Backend.probe`."""
        self._call(lambda: None, "take a step", timeout_s)

    def close(self, *, kill: bool = False) -> None:
        """See `Backend.close`."""
        with self._awake:
            self._closing = True
            self._awake.notify()
        self._thread.join(timeout=1 if kill else 60)
        if self._thread.is_alive():  # it hangs in a step
            self._fail_all(self._error)

    def _enqueue(self, work: Callable[[], None]) -> None:
        with self._awake:
            if self._closing or not self._thread.is_alive():
                raise self._error
            self._work.append(work)
            self._awake.notify()

    def _call(self, function: Callable[[], T], what: str, timeout_s: float) -> T:
        """Return the result of ``function``, called on the engine's thread between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def work() -> None:
            try:
                if self._engine is None:
                    raise self._error
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._enqueue(work)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            raise WorkerError(
                f"the vLLM engine on a thread of this process did not {what} within {timeout_s:g} s"
            ) from None
        except (EngineError, WorkerError):
            raise
        except Exception as error:
            raise EngineError(f"the vLLM engine failed to {what}: {quirks.one_line(error)}") from error

    # --- on the engine's thread --------------------------------------------------------------------------------------

    def _run(self, arguments: dict[str, Any], started: concurrent.futures.Future[Any]) -> None:
        with noting_reasons(arguments) as (noting, reason):
            try:
                self._engine = _make_engine(noting)
                quirks.forget_queue_to_workers(self._engine)
            except BaseException as error:
                started.set_exception(EngineError(f"vLLM cannot start: {reason() or quirks.root_reason(error)}"))
                return
        started.set_result(self._engine.vllm_config)
        try:
            while self._wait_for_work():
                while self._work:
                    self._work.popleft()()
                if not self._paused and self._engine.has_unfinished_requests():
                    with quirks.own_random_numbers():
                        self._engine.step()
                self._deliver()
        except Exception as error:
            logger.exception("vLLM failed in a step")
            self._error = WorkerError(f"vLLM failed in a step: {quirks.root_reason(error)}")
        finally:
            with self._awake:
                self._closing = True
            self._fail_all(self._error)
            self._engine.engine_core.shutdown()
            self._engine = None
            while self._work:  # late work fails with the same error
                self._work.popleft()()

    def _wait_for_work(self) -> bool:
        with self._awake:
            self._awake.wait_for(
                lambda: self._closing or self._work or (not self._paused and self._engine.has_unfinished_requests())
            )
            return not self._closing

    def _deliver(self) -> None:
        """Deliver outputs after the step: a caller may draw random numbers as soon as it has one."""
        outputs = self._outputs[:]
        self._outputs.clear()
        for key, output in outputs:
            done = self._done.pop(key, None)
            if done is not None:
                done(output)

    def _fail_all(self, error: Exception) -> None:
        outstanding, self._done = self._done, {}
        for done in outstanding.values():
            done(error)

    def _set_paused(self, paused: bool) -> None:
        if paused:
            quirks.stop_between_steps(self._engine)
        else:
            quirks.continue_stepping(self._engine)
        self._paused = paused

    def _add(self, key: str, prompt: list[int], params: Any, priority: int, done: Done) -> None:
        from vllm.inputs import tokens_input

        if self._engine is None:
            done(self._error)
            return
        try:
            internal = self._engine.add_request(
                key, tokens_input(prompt), params, lora_request=self._adapter, priority=priority
            )
        except Exception as error:
            done(EngineError(f"vLLM refuses the request: {quirks.root_reason(error)}"))
            return
        self._done[key] = done
        quirks.deliver_to(self._engine, internal, _Queue(self._outputs, key))


class _Queue:
    """Replaces the queue to which vLLM puts the outputs of a request; only the final one is put."""

    __slots__ = ("_key", "_outputs")

    def __init__(self, outputs: list[tuple[str, Any]], key: str) -> None:
        self._outputs, self._key = outputs, key

    def put(self, output: Any) -> None:
        self._outputs.append((self._key, output))


def _make_engine(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    with quirks.no_worker_processes():
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
        return LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
