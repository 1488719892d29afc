"""HTTP to one server: pooled connections on a thread of their own, and every failure as one readable error.

A `WorkerError` says that the server is gone, hangs or is broken; an `EngineError`, that it refuses what it was asked.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, Literal, TypeVar

import httpx

from rlcore.errors import EngineError, WorkerDied, WorkerError

T = TypeVar("T")

KEEP_ALIVE_S = 2.0
"""Idle connections are closed after this time: before the server does (vLLM and SGLang after 5 s), if this process is
not too busy to notice; then a request may meet a connection that the server has just closed."""
FIRST_RETRY_S = 0.2
MOST_WORDS = 600
"""Characters of a server's error that are repeated."""
GRACE_S = 5.0
"""How much longer than its own timeout a call from another thread waits for the connection's thread."""


class Connection:
    """A client of the server at ``url``. Methods may be called from any thread; coroutines run on its own.

    Args:
        api_key: sent as a bearer token; None sends none.
        most: connections at a time.
        retries: further attempts while no connection comes about, on a kept connection that was closed before an answer
            began, and for calls that ask only.
        timeout_s: the usual limit of `ask`.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        most: int = 256,
        retries: int = 3,
        timeout_s: float = 60,
        connect_timeout_s: float = 10,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._retries = retries
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=KEEP_ALIVE_S),
            timeout=httpx.Timeout(None, connect=connect_timeout_s),
            trust_env=False,  # a proxy of the environment is not for servers on this machine
        )
        self._thread = threading.Thread(target=self._run, name=f"client of {self.url}", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run ``work`` on the connection's thread."""
        if self._closed:
            work.close()
            raise WorkerDied(f"the connection to {self.url} is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait_for(self, work: Coroutine[Any, Any, T], what: str, timeout_s: float | None = None) -> T:
        """The result of ``work`` on the connection's thread, which is cancelled after ``timeout_s`` (the usual limit).

        Raises:
            WorkerDied: it took longer.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        working = self.submit(work)
        try:
            return working.result(limit)
        except concurrent.futures.TimeoutError:
            working.cancel()
            raise WorkerDied(f"{self.url} did not {what} within {limit:g} s") from None

    def ask(
        self,
        method: Literal["GET", "POST"],
        path: str,
        what: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        timeout_s: float | None = None,
        plain: bool = False,
    ) -> Any:
        """What the server answers, waiting in this thread; see `request`."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        work = self.request(method, path, what, params=params, body=body, timeout_s=limit, plain=plain)
        return self.wait_for(work, what, (self._retries + 1) * limit + GRACE_S)

    async def request(
        self,
        method: Literal["GET", "POST"],
        path: str,
        what: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        timeout_s: float | None = None,
        plain: bool = False,
    ) -> Any:
        """The decoded answer (None if it is empty), on the connection's thread.

        Args:
            what: completes "the server did not …" in messages.
            timeout_s: longest wait for the answer; None leaves it to the caller.
            plain: the answer is text, not JSON.

        Raises:
            WorkerDied: nobody accepts connections, or the connection broke off, or no answer came in time.
            WorkerError: the server failed (5xx); the message holds its own words.
            EngineError: the server refuses (4xx); the message holds its own words.
        """
        wait = FIRST_RETRY_S
        for left in range(self._retries, -1, -1):
            course = _Course()
            try:
                async with asyncio.timeout(timeout_s):
                    response = await self._client.request(
                        method, path, params=params, json=body, extensions={"trace": course.note}
                    )
                return response.text if plain and response.is_success else self._decoded(response, what)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # nothing was sent
                failure = WorkerDied(f"{self.url} accepts no connection: {_words(error)}")
            except TimeoutError:
                raise WorkerDied(f"{self.url} did not {what} within {timeout_s:g} s") from None
            except httpx.TransportError as error:
                failure = WorkerDied(f"{self.url} closed the connection before it could {what}: {_words(error)}")
                if method != "GET" and not course.stale:
                    raise failure from error
            if not left:
                raise failure
            await asyncio.sleep(wait)
            wait *= 2
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Break off what is under way and end the thread; idempotent."""
        if self._closed:
            return
        self._closed = True
        ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            ending.result(GRACE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(GRACE_S)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=GRACE_S / 2)
        await self._client.aclose()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _decoded(self, response: httpx.Response, what: str) -> Any:
        if response.is_success:
            try:
                return response.json() if response.content else None
            except ValueError:
                raise WorkerError(
                    f"{self.url} answered something else than JSON when it should {what}: {response.text[:80]!r}"
                ) from None
        status, words = response.status_code, _server_words(response)
        if status == 401:
            raise EngineError(f"{self.url} refuses access ({status}: {words}); set api_key_env to the key's variable")
        if status >= 500:
            raise WorkerError(f"{self.url} failed to {what} ({status}): {words}")
        raise EngineError(f"{self.url} refuses to {what} ({status}): {words}")


class _Course:
    """What httpcore says of one request: whether its connection was new, and whether an answer began."""

    def __init__(self) -> None:
        self._new = self._answered = False

    async def note(self, event: str, _: Mapping[str, Any]) -> None:
        self._new |= event == "connection.connect_tcp.started"
        self._answered |= event == "http11.receive_response_headers.complete"

    @property
    def stale(self) -> bool:
        """Whether the failure can be that of a kept connection, which the server gave up before it saw the request."""
        return not self._new and not self._answered


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _server_words(response: httpx.Response) -> str:
    """The server's own message, from the shapes in which vLLM, SGLang and FastAPI give it."""
    try:
        answer = response.json()
    except ValueError:
        answer = response.text
    if isinstance(answer, dict):
        answer = answer.get("error", answer.get("detail", answer))
    if isinstance(answer, dict):
        answer = answer.get("message", answer)
    text = " ".join(str(answer).split()) or response.reason_phrase
    return text if len(text) <= MOST_WORDS else text[:MOST_WORDS] + " …"
