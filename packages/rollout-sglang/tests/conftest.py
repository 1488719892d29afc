"""A proxy in front of a real server that injects faults."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest


class FaultyProxy(ThreadingHTTPServer):
    """Forwards requests to the server, except where ``faults`` holds a fault.

    Attributes:
        faults: what happens at a path: "error" a 500, "refuse" a 400, "reset" the connection is closed before the
            answer, "half" in the middle of it, "hang" no answer, "garbage" no JSON, "strange" JSON of another form.
        good: number of requests for completions that are forwarded before the faults begin.
        asked: path and body of all requests.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str) -> None:
        self.target, self.faults, self.good = target, {}, 0
        self.asked: list[tuple[str, dict]] = []
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.client = httpx.Client(base_url=target, timeout=120, trust_env=False)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()
        self.client.close()

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *_) -> None:
        return

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        length = int(self.headers.get("content-length", 0))
        content = self.rfile.read(length)
        if len(content) < length:  # the client cancelled the request while it sent it
            self.close_connection = True
            return
        proxy = self.server
        proxy.asked.append((self.path, json.loads(content) if content else {}))
        fault = proxy.faults.get(self.path, "")
        if self.path == "/generate" and proxy.good > 0:
            proxy.good -= 1
            fault = ""
        match fault:
            case "":
                headers = {name: self.headers[name] for name in ("authorization", "content-type") if self.headers[name]}
                answer = proxy.client.request(method, self.path, content=content, headers=headers)
                self._send(answer.content, answer.status_code)
            case "error":
                self._send(b'{"error": {"message": "the scheduler met an exception"}}', 500)
            case "refuse":
                self._send(b'{"success": false, "message": "not now"}', 400)
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.close_connection = True
                self.connection.close()
            case "half":
                self.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"output_ids": [')
                self.close_connection = True
            case "hang":
                proxy.released.wait(120)
                self.close_connection = True
            case "garbage":
                self._send(b"<html>gateway</html>", 200)
            case "strange":
                self._send(b'{"text": "no tokens"}', 200)

    def _send(self, content: bytes, status: int) -> None:
        with suppress(OSError):
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


@pytest.fixture
def proxy(server):
    started = FaultyProxy(server.url)
    yield started
    started.stop()
