"""Runs commands in forks of a process that has everything imported, and judges how they end."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WALL_S = 120
CPU_S = 60
MEMORY_BYTES = 6 << 30  # of address space, of which threads reserve much without using it
LONGEST_ERROR = 3000
_PRELOAD = [
    "torch",
    "pyarrow.parquet",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "rlcore_fsdp.engine",
    "rlcore_inline.engine",
    "rlcore_rewards.pool",
    "rlcore_recipes.grpo",
    "rlcore_recipes.sft",
    "rlcore.cli.command_tree",
    "rlcore.cli.run",
    "rlcore.cli.config",
    "rlcore_recipes.from_verl.command",
]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code, negative for the signal that ended it; None if it had to be killed.
    """

    code: int | None
    output: str

    def fault(self, *, must_fail: bool) -> str | None:
        """What is wrong with this end; None where nothing is."""
        if self.code is None:
            return f"it did not end within {WALL_S} s"
        if self.code < 0:
            return f"it was ended by {signal.Signals(-self.code).name}"
        if "Traceback (most recent call last)" in self.output:
            return "it printed a traceback"
        if self.code == 0:
            return "it ended well, on input that it cannot have understood" if must_fail else None
        if self.code != 1:
            return f"it ended with code {self.code}"
        _, mark, error = self.output.partition("error: ")
        if not mark:
            return "it failed without an error"
        if len(error) > LONGEST_ERROR:
            return f"its error has {len(error)} characters"
        return None


class Commands:
    """Commands of ``rlcore``, each in a fork of a server process."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)

    def run(self, arguments: Sequence[str], folder: Path) -> Ended:
        """Run ``rlcore *arguments`` in ``folder``."""
        output = folder / "output.txt"
        process = self._context.Process(target=_command, args=(list(arguments), str(folder), str(output)))
        process.start()
        process.join(WALL_S)
        code = process.exitcode
        if process.pid is not None and code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        text = output.read_bytes().decode(errors="replace") if output.exists() else ""
        return Ended(code, text)


def _command(arguments: list[str], folder: str, output: str) -> None:
    import sys

    from rlcore.cli.command_tree import cli

    os.setsid()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY_BYTES,) * 2)
    cli.main(arguments, prog_name="rlcore")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
