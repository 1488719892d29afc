"""The program of a worker process: ``python -m rlcore_agents.environment.worker``, started by `processes`.

It plays one episode after another. What it receives is pickled; what it sends is JSON, since the trainer must not
unpickle what a process that runs code of users writes.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rlcore.boundary import reason
from rlcore.errors import RlcoreError
from rlcore_agents.conversation import Reply
from rlcore_agents.environment.exchange import Outcome, Request
from rlcore_agents.environment.loading import load_program
from rlcore_agents.environment.play import Program, play
from rlcore_agents.environment.settings import PythonEnvironmentSettings
from rlcore_agents.tools.thread import in_thread
from rlcore_kit.worker.guard import serve_guarded
from rlcore_kit.worker.messages import read_message, write_message


def serve(requests: int, replies: int) -> None:
    """Load the environment that the first message names, and play an episode for every further one."""
    with open(requests, "rb") as incoming, open(replies, "wb") as outgoing:
        program, problem = _load(pickle.loads(read_message(incoming)))
        write_message(outgoing, json.dumps({"error": problem}).encode())

        def exchange(request: Request) -> Reply | None:
            write_message(outgoing, json.dumps({"request": asdict(request)}).encode())
            message = read_message(incoming)
            if not message:
                os._exit(0)  # the trainer is gone
            reply: Reply | None = pickle.loads(message)
            return reply

        while program and (message := read_message(incoming)):
            sample, seed = pickle.loads(message)
            outcome = _play(program, exchange, sample, seed)
            write_message(outgoing, json.dumps({"outcome": asdict(outcome)}).encode())


def _load(setup: dict[str, Any]) -> tuple[Program | None, str]:
    sys.path[:] = setup["sys_path"]
    try:
        return load_program(PythonEnvironmentSettings.model_validate(setup["options"])), ""
    except RlcoreError as error:
        return None, str(error)
    except BaseException as error:
        return None, f"environment {setup['options']['path']!r}: importing it fails: {reason(error)}"


def _play(program: Program, exchange: Callable[[Request], Reply | None], sample: Any, seed: int) -> Outcome:
    async def policy(request: Request) -> Reply | None:
        return await in_thread(lambda: exchange(request))

    try:
        return asyncio.run(play(program, policy, sample, seed))
    except BaseException as error:
        return Outcome(error=f"{program.name} ended with {reason(error)}")


if __name__ == "__main__":
    serve_guarded(serve)
