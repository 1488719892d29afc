"""Environments in the process of the rollout, on event loops that are not the engine's.

Coroutines of environments share an event loop in a thread, so that one that blocks does not stop generation. A loop
that no longer answers is left behind, and later episodes get a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from threading import Lock, Thread
from warnings import warn

from rlcore.engines.episode import PromptSample
from rlcore.errors import RlcoreWarning
from rlcore_agents.conversation import Reply
from rlcore_agents.environment.exchange import EnvironmentFailure, Outcome, Policy, Request
from rlcore_agents.environment.play import Program, play

END_S = 5.0
"""Seconds that an environment has to close after a timeout."""
ALIVE_S = 1.0
"""Seconds within which an event loop must answer."""
BLOCKED = (
    "environment {} blocks its event loop; later episodes use another one, and those on this one are lost: await what "
    "takes long, or write plain functions, which run in threads"
)


class LocalSession:
    """One episode's environment; used from the event loop of the engine, which is not that of the environment.

    Args:
        loop: of the environment.
        episode: plays the episode with a policy.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, episode: Callable[[Policy], Awaitable[Outcome]]) -> None:
        self._loop = loop
        self._episode = episode
        self._task: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Reply | None] | None = None
        self._out: Future[Request | Outcome] = Future()
        self._ended: Future[None] = Future()

    async def exchange(self, reply: Reply | None, seconds: float, limit: str) -> Request | Outcome:
        """Give the environment the reply to its request (at first None: begin) and return what it sends next.

        Args:
            limit: setting that defines ``seconds``, for the error message.

        Raises:
            EnvironmentFailure: it did not answer in time.
        """
        out: Future[Request | Outcome] = Future()
        self._loop.call_soon_threadsafe(self._go_on, reply, out)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(out), seconds)
        except TimeoutError:
            raise EnvironmentFailure(f"the environment took longer than {limit}") from None

    def cancel(self) -> None:
        """Cancel the environment's coroutine, which closes it; nothing happens after its outcome."""
        self._loop.call_soon_threadsafe(self._cancel)

    async def ended(self) -> bool:
        """Wait until the environment is closed; return False if it is not within `END_S`."""
        done, _ = await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=END_S)
        return bool(done)

    def _go_on(self, reply: Reply | None, out: Future[Request | Outcome]) -> None:
        self._out = out
        if self._task is None:
            self._task = self._loop.create_task(self._run())
        elif self._answer and not self._answer.done():
            self._answer.set_result(reply)

    async def _run(self) -> None:
        try:
            self._send(await self._episode(self._policy))
        except Exception as error:
            self._out.set_exception(error)
        finally:
            self._ended.set_result(None)

    async def _policy(self, request: Request) -> Reply | None:
        if self._task is None or self._task.cancelling() or self._task.done():
            raise asyncio.CancelledError  # a thread of the environment goes on after the end of its episode
        self._answer = self._loop.create_future()
        self._send(request)
        return await self._answer

    def _send(self, message: Request | Outcome) -> None:
        if not self._out.done():
            self._out.set_result(message)

    def _cancel(self) -> None:
        if self._task is None:
            self._ended.set_result(None)
            return
        self._task.cancel()
        if self._answer:
            self._answer.cancel()


class LocalHost:
    """Starts sessions, on one event loop as long as it answers."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def slot(self) -> AbstractAsyncContextManager[None]:
        """Hold nothing: any number of episodes run at the same time."""
        return nullcontext()

    async def open(self, sample: PromptSample, seed: int) -> LocalSession:
        """Return a new session for an episode."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                Thread(target=self._loop.run_forever, name="environments", daemon=True).start()
            return LocalSession(self._loop, lambda policy: play(self._program, policy, sample, seed))

    async def stop(self, session: LocalSession) -> None:
        """End a session whose environment did not answer in time."""
        session.cancel()
        if await session.ended():
            return
        loop = session._loop
        alive = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop)
        done, _ = await asyncio.wait([asyncio.wrap_future(alive)], timeout=ALIVE_S)
        with self._lock:
            if not done and self._loop is loop:
                self._loop = None
                warn(BLOCKED.format(self._program.name), RlcoreWarning, stacklevel=2)

    def close(self) -> None:
        """End what still runs, and the event loop."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        with suppress(TimeoutError):  # the loop is blocked, or code of the environment does not end
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(END_S)
        loop.call_soon_threadsafe(loop.stop)


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        if not task.cancelling():
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
