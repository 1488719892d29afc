"""HTTP to one server: pooled connections on a separate thread, and every failure as one readable error.

A `WorkerError` means that the server is gone, hangs or is broken; an `EngineError`, that it refuses the request.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, Literal, TypeVar, cast

import httpx

from rlcore.errors import EngineError, WorkerDied, WorkerError

T = TypeVar("T")

KEEP_ALIVE_S = 2.0
"""Idle connections are closed after this time, before the server closes them (vLLM and SGLang after 5 s). If this
process is too busy to do so in time, a request may use a connection that the server has just closed."""
FIRST_RETRY_S = 0.2
STREAM_END = b"[DONE]"
"""Last event of a stream of the OpenAI protocol."""
MAXIMUM_QUOTE = 600
"""Characters of a server's error that a message quotes."""
GRACE_S = 5.0
"""Seconds that a call from another thread waits in addition to the timeout of its request."""


class Overloaded(EngineError):
    """The server has too many requests (429) and took none of this one.

    Attributes:
        retry_after_s: seconds after which it asks to be asked again; None if it does not say.
    """

    retry_after_s: float | None = None


class Connection:
    """A client of the server at ``url``.

    Methods may be called from any thread; coroutines run on the connection's thread.

    Args:
        api_key: sent as a bearer token; None sends none.
        headers: further headers of every request.
        max_connections: maximum number of simultaneous connections.
        retries: further attempts if no connection can be established, if a kept connection was closed before an answer
            began, and for GET requests.
        timeout_s: default timeout of `ask`.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        max_connections: int = 256,
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
            headers={**(headers or {}), **({} if api_key is None else {"Authorization": f"Bearer {api_key}"})},
            limits=httpx.Limits(
                max_connections=max_connections,
                max_keepalive_connections=max_connections,
                keepalive_expiry=KEEP_ALIVE_S,
            ),
            timeout=httpx.Timeout(None, connect=connect_timeout_s),
            trust_env=False,  # a proxy in the environment does not reach servers on this machine
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
        """Return the result of ``work``, which runs on the connection's thread and is cancelled after ``timeout_s``.

        The default leaves each request of ``work`` time for its own timeout and retries.

        Raises:
            WorkerDied: it took longer.
        """
        limit = self._limit_with_retries(self.timeout_s) if timeout_s is None else timeout_s
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
        """Return the server's answer, waiting in this thread; see `request`."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        work = self.request(method, path, what, params=params, body=body, timeout_s=limit, plain=plain)
        return self.wait_for(work, what, self._limit_with_retries(limit))

    def _limit_with_retries(self, timeout_s: float) -> float:
        return (self._retries + 1) * timeout_s + GRACE_S

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
        """Send a request, on the connection's thread, and return the decoded answer, None if it is empty.

        Args:
            what: completes "the server did not …" in messages.
            timeout_s: timeout of the answer; None waits without limit.
            plain: the answer is text, not JSON.

        Raises:
            WorkerDied: no connection was accepted, the connection broke, or no answer came in time.
            WorkerError: the server failed (5xx); the message quotes it.
            EngineError: the server refuses (4xx); the message quotes it.
        """
        wait = FIRST_RETRY_S
        for left in range(self._retries, -1, -1):
            trace = _RequestTrace()
            try:
                async with asyncio.timeout(timeout_s):
                    response = await self._client.request(
                        method, path, params=params, json=body, extensions={"trace": trace.note}
                    )
                return response.text if plain and response.is_success else self._decoded(response, what)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # nothing was sent
                failure = WorkerDied(f"{self.url} accepts no connection: {_reason(error)}")
            except TimeoutError:
                raise WorkerDied(f"{self.url} did not {what} within {timeout_s:g} s") from None
            except httpx.TransportError as error:
                failure = WorkerDied(f"{self.url} closed the connection before it could {what}: {_reason(error)}")
                if method != "GET" and not trace.stale:
                    raise failure from error
            if not left:
                raise failure
            await asyncio.sleep(wait)
            wait *= 2
        raise AssertionError("unreachable")

    async def events(self, path: str, what: str, *, body: Any) -> AsyncGenerator[Any]:
        """Post ``body`` and yield the decoded events of the answer (server-sent events), on the connection's thread.

        Closing the iterator closes the stream (`contextlib.aclosing`). There is no timeout: callers set one.

        Raises:
            WorkerDied, WorkerError, EngineError: as for `request`; a stream that breaks is never sent again.
        """
        wait = FIRST_RETRY_S
        for left in range(self._retries, -1, -1):
            trace = _RequestTrace()
            try:
                async with self._client.stream("POST", path, json=body, extensions={"trace": trace.note}) as response:
                    if not response.is_success:
                        await response.aread()
                        self._decoded(response, what)
                    async with contextlib.aclosing(_lines(response)) as lines:
                        async for line in lines:
                            field, _, value = line.partition(b":")
                            if field == b"data" and value.strip() != STREAM_END:
                                yield self._event(value, what)
                return
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # nothing was sent
                failure = WorkerDied(f"{self.url} accepts no connection: {_reason(error)}")
            except httpx.TransportError as error:
                failure = WorkerDied(f"{self.url} closed the connection before it could {what}: {_reason(error)}")
                if not trace.stale:
                    raise failure from error
            if not left:
                raise failure
            await asyncio.sleep(wait)
            wait *= 2

    def _event(self, content: bytes, what: str) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            start = content[:80].decode(errors="replace")
            raise WorkerError(f"{self.url} sent an event that is not JSON when asked to {what}: {start!r}") from None

    def close(self) -> None:
        """Cancel requests and end the thread; idempotent."""
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
                    f"{self.url} did not answer in JSON when asked to {what}: {response.text[:80]!r}"
                ) from None
        status, message = response.status_code, _error_message(response)
        if status == 401:
            raise EngineError(
                f"{self.url} refuses access ({status}: {message}); set api_key_env to the environment variable that "
                "holds the API key"
            )
        if status == 429:
            overloaded = Overloaded(f"{self.url} has too many requests to {what} ({status}): {message}")
            with contextlib.suppress(ValueError):  # a date is not understood
                overloaded.retry_after_s = float(response.headers.get("retry-after", ""))
            raise overloaded
        if status >= 500:
            raise WorkerError(f"{self.url} failed to {what} ({status}): {message}")
        raise EngineError(f"{self.url} refuses to {what} ({status}): {message}")


class _RequestTrace:
    """Events that httpcore reports for one request: whether its connection was new, and whether an answer began."""

    def __init__(self) -> None:
        self._new = self._answered = False

    async def note(self, event: str, _: Mapping[str, Any]) -> None:
        self._new |= event == "connection.connect_tcp.started"
        self._answered |= event == "http11.receive_response_headers.complete"

    @property
    def stale(self) -> bool:
        """Whether the server may have closed a kept connection before it saw the request."""
        return not self._new and not self._answered


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes]:
    """Yield the lines of a stream, without their ends.

    ``httpx.Response.aiter_lines`` also ends a line at characters such as U+2028 and U+0085, which JSON may hold and
    models write.
    """
    rest = b""
    async with contextlib.aclosing(cast(AsyncGenerator[bytes], response.aiter_bytes())) as pieces:
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line.removesuffix(b"\r")
    if rest:
        yield rest


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _error_message(response: httpx.Response) -> str:
    """Return the error message in a response of vLLM, SGLang or FastAPI."""
    try:
        answer = response.json()
    except ValueError:
        answer = response.text
    if isinstance(answer, dict):
        answer = answer.get("error", answer.get("detail", answer))
    if isinstance(answer, dict):
        answer = answer.get("message", answer)
    text = " ".join(str(answer).split()) or response.reason_phrase
    return text if len(text) <= MAXIMUM_QUOTE else text[:MAXIMUM_QUOTE] + " …"
