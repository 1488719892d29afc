"""Program of the process that `ForkServer` starts: import modules once, then fork a process for every request.

    python -P fork_server.py SOCKET MODULE...

The program needs the standard library alone and ends when its standard input is closed. A request is a line of JSON
with ``argv`` (the arguments of ``python``), ``environ``, ``cwd`` and ``new_session``; it carries the standard streams.
The answers are the process id and, when the process has ended, its exit code (negative: a signal).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from typing import Any

Request = tuple[dict[str, Any], list[int]]


def serve(listener: socket.socket) -> Request:
    """Fork a process for every request. Return only in the forked processes, with the request of each."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    clients: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([sys.stdin, listener, woken], [], [])
        if sys.stdin in ready:
            os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
            _reap(clients)
        if listener in ready:
            client, _ = listener.accept()
            request = _receive(client)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for inherited in (listener, client, *clients.values()):
                    inherited.close()
                for descriptor in (woken, wakes):
                    os.close(descriptor)
                return request
            clients[pid] = client
            for stream in request[1]:
                os.close(stream)
            _answer(client, pid)


def _receive(client: socket.socket) -> Request:
    message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += client.recv(1 << 20)
    return json.loads(message), streams


def _answer(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # a client need not wait for the end
        client.sendall(f"{number}\n".encode())


def _reap(clients: dict[int, socket.socket]) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with clients.pop(ended[0]) as client:
                _answer(client, os.waitstatus_to_exitcode(ended[1]))


def become(request: Request) -> None:
    """Run the program of the request, as a new interpreter would."""
    order, streams = request
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(order["environ"])
    os.chdir(order["cwd"])
    if order["new_session"]:
        os.setsid()
    tempfile.tempdir = None
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    match order["argv"]:
        case ["-m", module, *arguments]:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *arguments]:
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")


def main(path: str, *modules: str) -> None:
    """Import the modules, say "ready", and serve the socket at ``path``."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the collector would copy the pages that the processes share
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    become(serve(listener))


if __name__ == "__main__":
    main(*sys.argv[1:])
