"""An ASGI application served in a thread with an event loop."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from rlcore.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    import uvicorn

START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 5


class ServerThread:
    """Serves ``app`` until `close`.

    Attributes:
        url: the server's address, without a final slash.

    Raises:
        ConfigError: the port cannot be opened.
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0) -> None:
        import uvicorn

        try:
            self._socket = socket.create_server((host, port), backlog=1024)
        except OSError as error:
            raise ConfigError(f"cannot serve on {host}:{port}: {error}; choose another host or port") from error
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        options = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=1
        )
        self._server: uvicorn.Server = uvicorn.Server(options)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="endpoint", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise WorkerError(f"the server of {self.url} did not start")
            time.sleep(0.005)

    def close(self) -> None:
        """Stop serving; requests that are unfinished after a second are cancelled. Idempotent."""
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        self._socket.close()
