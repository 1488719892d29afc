"""Entry point of a server's process: ``python -m rlcore_sglang.serve FILE``, with the arguments as JSON in FILE.

They are in a file because they include the API key, which other users must not see in the list of processes. The server
ends when its standard input closes, and therefore with the process that started it, even if that was killed.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
from pathlib import Path

REFUSED = "rlcore refuses: "
"""Prefix of a message for the user on the last line of the log."""


def main(file: Path) -> None:
    """Run the server with the arguments in ``file`` until it ends.

    Raises:
        SystemExit: the user's arguments are invalid.
    """
    threading.Thread(target=_end_with_starter, daemon=True).start()
    given = json.loads(file.read_text())
    from sglang.srt.server_args import ServerArgs

    from rlcore_sglang.arguments import problems

    wrong = problems(given["args"], inspect.signature(ServerArgs).parameters)
    if wrong:
        raise SystemExit(f"{REFUSED}rollout.sglang.args: {'; '.join(wrong)}")
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    arguments = ServerArgs(**given["arguments"])
    arguments.resolve_once()
    try:
        launch_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _end_with_starter() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
