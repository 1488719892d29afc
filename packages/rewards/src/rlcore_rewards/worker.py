"""The worker process: ``python -m rlcore_rewards.worker``, started by `rlcore_rewards.function_worker`.

It reads pickled requests of the trainer and writes replies (`rlcore_rewards.reply`), as messages
(`rlcore_kit.worker.messages`). The first request names the function to load.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

from rlcore_kit.worker.guard import serve_guarded
from rlcore_kit.worker.messages import read_message, write_message
from rlcore_kit.worker.process import WorkerFailure
from rlcore_rewards.reply import encode_failure, encode_result

READY = b"{}"
MAX_MESSAGE = 4000


def serve(requests: int, replies: int) -> None:
    """Answer requests until the pipe of requests is closed."""
    process = os.getpid()
    score: Callable[[Any], Any] | None = None
    with open(requests, "rb") as incoming, open(replies, "wb") as outgoing:
        while request := read_message(incoming):
            if score is None:
                score, reply = _load(pickle.loads(request))
            else:
                reply = _attempt(score, request)
            for stream in (sys.stdout, sys.stderr):
                if stream and not stream.closed:
                    stream.flush()
            if os.getpid() != process:  # the function forked; this is the forked process
                os._exit(0)
            write_message(outgoing, reply)


def _load(setup: dict[str, Any]) -> tuple[Callable[[Any], Any] | None, bytes]:
    sys.path[:] = setup["sys_path"]
    module, _, attribute = setup["loader"].partition(":")
    try:
        return getattr(import_module(module), attribute)(setup["options"]), READY
    except WorkerFailure as failure:
        return None, encode_failure(failure.kind, str(failure))
    except BaseException as error:
        text = str(error).partition("\n")[0][:MAX_MESSAGE]
        if not isinstance(error, SyntaxError):  # its text has file and line
            where = traceback.extract_tb(error.__traceback__)[-1]
            text += f" ({where.filename}, line {where.lineno})"
        message = f"importing it fails with {type(error).__name__}: {text}"
        return None, encode_failure("startup", message)


def _attempt(score: Callable[[Any], Any], request: bytes) -> bytes:
    try:
        return encode_result(score(pickle.loads(request)))
    except WorkerFailure as failure:
        return encode_failure(failure.kind, str(failure))
    except MemoryError:
        return encode_failure("memory", "the function requested more memory than memory_mb allows")
    except SystemExit as error:
        return encode_failure("exit", _traceback(error))
    except BaseException as error:
        return encode_failure("exception", _traceback(error))


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))[-MAX_MESSAGE:].strip()
    except BaseException as another:  # the function defines the text, which may be huge or raise
        return f"{type(error).__name__}, whose text cannot be formatted: {type(another).__name__}"


if __name__ == "__main__":
    serve_guarded(serve)
