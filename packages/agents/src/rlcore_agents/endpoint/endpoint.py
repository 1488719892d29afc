"""`Endpoint`: sessions over HTTP. Each has an address and a key; a request reaches only the session of its address."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as HTTPRoute

from rlcore.engines.rollout import RolloutEngine, SamplingParams
from rlcore_agents.endpoint import token_protocol
from rlcore_agents.endpoint.server_thread import ServerThread
from rlcore_agents.endpoint.session import Refusal, Session

logger = logging.getLogger(__name__)

MAXIMUM_BODY = 64 << 20
"""Bytes of a request."""

ErrorForm = Callable[[Refusal], Mapping[str, Any]]
"""Returns the body of an error in a protocol's form."""

S = TypeVar("S", bound=Session)


@dataclass(frozen=True)
class Route:
    """A path of every session.

    Attributes:
        path: below the session's address.
        answer: returns the answer to the JSON object that was sent ({} for GET); it may raise `Refusal`.
        error: returns the protocol's body of an error.
    """

    path: str
    answer: Callable[[Any, Mapping[str, Any], Mapping[str, str]], Coroutine[Any, Any, Response]]
    error: ErrorForm = token_protocol.error
    method: str = "POST"


async def _health(session: Session, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    return JSONResponse({})


async def _models(session: Session, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    return JSONResponse(token_protocol.models(session))


async def _generate(session: Session, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    return JSONResponse(await token_protocol.generate(session, body))


TOKEN_ROUTES = (
    Route("/health", _health, method="GET"),
    Route("/v1/models", _models, method="GET"),
    Route("/inference/v1/generate", _generate),
)


class Endpoint:
    """A server on loopback, in a thread of this process.

    Args:
        routes: paths of every session.
        host: address to serve on. Sessions have keys, but nothing is encrypted: leave it on loopback unless the network
            is trusted.
        port: 0 chooses a free one.

    Attributes:
        strays: requests with the address of no session; `take_strays` resets it.
    """

    def __init__(self, routes: Sequence[Route] = TOKEN_ROUTES, host: str = "127.0.0.1", port: int = 0) -> None:
        self._sessions: dict[str, Session] = {}
        self.strays = 0
        served = [
            HTTPRoute(f"/sessions/{{session}}{route.path}", self._handler(route), methods=[route.method])
            for route in routes
        ]
        self._fallback = routes[0].error
        self._server = ServerThread(
            Starlette(routes=served, exception_handlers={404: self._unknown_path, 405: self._unknown_path}), host, port
        )

    @property
    def url(self) -> str:
        """The server's address."""
        return self._server.url

    @contextmanager
    def session(
        self,
        engine: RolloutEngine,
        model: str,
        max_model_len: int,
        *,
        name: str = "session",
        sampling: SamplingParams | None = None,
        seed: int | None = None,
    ) -> Iterator[Session]:
        """Serve ``engine`` at an address until the end of the block; see `Session` for the arguments.

        Args:
            name: start of the session's id.
        """
        identity = self.identity(name)
        session = Session(engine, f"{self.url}/sessions/{identity}", identity, model, max_model_len, sampling, seed)
        with self.serving(session):
            yield session

    def identity(self, name: str) -> str:
        """Return a new id of a session that begins with ``name``."""
        return f"{name}-{secrets.token_hex(4)}"

    @contextmanager
    def serving(self, session: S) -> Iterator[S]:
        """Serve ``session`` until the end of the block, which aborts its unfinished requests."""
        self._sessions[session.id] = session
        try:
            yield session
        finally:
            del self._sessions[session.id]
            session.end()

    def take_strays(self) -> int:
        """Return `strays`, and count from 0 again."""
        strays, self.strays = self.strays, 0
        return strays

    def close(self) -> None:
        """Stop serving."""
        self._server.close()

    # --- requests --------------------------------------------------------------------------------------------------

    def _handler(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            session = None
            try:
                session = self._session(request)
                session.requests += 1
                _check_key(session, request)
                body = await _json_object(request) if route.method == "POST" else {}
                work = session.begin(route.answer(session, body, request.headers))
                return await _unless_disconnected(request, work)
            except Refusal as refusal:
                return self._refuse(route.error, session, refusal)
            except ClientDisconnect:
                return Response(status_code=499)
            except asyncio.CancelledError:
                return self._refuse(route.error, session, Refusal(404, f"episode {_identity(request)} has ended"))
            except Exception as error:
                logger.exception("a request to %s failed", request.url.path)
                return self._refuse(
                    route.error, session, Refusal(500, f"internal error: {type(error).__name__}: {error}")
                )

        return handle

    def _session(self, request: Request) -> Session:
        """Return the session of the request's address.

        Raises:
            Refusal: there is none.
        """
        identity = _identity(request)
        if identity not in self._sessions:
            raise Refusal(404, f"episode {identity} has ended, or there never was one; requests are no longer answered")
        return self._sessions[identity]

    def _refuse(self, form: ErrorForm, session: Session | None, refusal: Refusal) -> Response:
        if session is None:
            self.strays += 1
        else:
            session.refused += 1
            session.refusal = refusal.message
            if session.id not in refusal.message:
                refusal.message += f" (episode {session.id})"
        return JSONResponse(dict(form(refusal)), refusal.status)

    def _unknown_path(self, request: Request, error: Exception) -> Response:
        session = self._sessions.get(request.url.path.removeprefix("/sessions/").split("/")[0])
        where = "" if session else f"; addresses begin with {self.url}/sessions/"
        refusal = Refusal(404, f"there is no {request.method} {request.url.path}{where}")
        return self._refuse(self._fallback, session, refusal)


def _identity(request: Request) -> str:
    return str(request.path_params["session"])[:100]


def _check_key(session: Session, request: Request) -> None:
    """Refuse a request without the key of ``session``."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = request.headers.get("x-api-key") or (bearer if scheme.lower() == "bearer" else "")
    if not secrets.compare_digest(given.encode(), session.key.encode()):
        problem = "the API key is not that of" if given else "no API key was sent to"
        raise Refusal(401, f"{problem} episode {session.id}; use the key that the episode's program was given")


async def _json_object(request: Request) -> Mapping[str, Any]:
    """Return the body.

    Raises:
        Refusal: it is too large, or no JSON object.
    """
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > MAXIMUM_BODY:
            raise Refusal(413, f"the body of the request has more than {MAXIMUM_BODY >> 20} MiB")
    try:
        body = json.loads(received)
        if b"\\ud" in received.lower():  # JSON may have halves of characters, which no text has
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body of the request is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, f"the body of the request must be a JSON object, not {type(body).__name__}")
    return body


async def _unless_disconnected(request: Request, work: asyncio.Future[Response]) -> Response:
    """Return the result of ``work``; cancel it if the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        watch.cancel()
        work.cancel()
