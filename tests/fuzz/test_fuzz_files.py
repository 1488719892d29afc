"""Every file that a command reads, mutated."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from fuzz import ALL, chosen
from fuzz.cases import COMMANDS, TARGETS, Target, copy_of, make_base, trained
from fuzz.commands import Commands, Ended

PER_FILE = 8
"""Cases per file in the default run."""


@pytest.fixture(scope="module")
def commands() -> Commands:
    return Commands()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_base(folder, commands)
    return folder


@pytest.mark.parametrize(
    ("ended", "must_fail"),
    [
        (Ended(None, ""), False),
        (Ended(-9, ""), False),
        (Ended(2, "error: no"), False),
        (Ended(1, "Aborted"), False),
        (Ended(1, f"error: {'x' * 10_000}"), False),
        (Ended(0, "Traceback (most recent call last):"), False),
        (Ended(0, ""), True),
    ],
)
def test_a_bad_end_is_a_fault(ended: Ended, must_fail: bool) -> None:
    assert ended.fault(must_fail=must_fail) is not None
    assert Ended(1, "warning: b\nerror: c").fault(must_fail=must_fail) is None


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_well_on_files_that_are_as_they_were(
    commands: Commands, base: Path, tmp_path: Path, command: str
) -> None:
    folder = copy_of(base, tmp_path / "copy")
    ended = commands.run(COMMANDS[command], folder)
    assert ended.code == 0, ended.output
    assert trained(folder, command) is None


@pytest.mark.timeout(0 if ALL else 900)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.path}, {target.command}")
def test_a_mutated_file_ends_in_success_or_one_error(
    commands: Commands, base: Path, tmp_path: Path, target: Target
) -> None:
    found = target.mutations(base)
    before = (base / target.path).read_bytes()
    faults = []
    for number, name in enumerate(chosen(found, PER_FILE)):
        folder = copy_of(base, tmp_path / str(number))
        file = folder / target.path
        found[name](file)
        if file.is_file() and not file.is_symlink() and file.read_bytes() == before:
            continue
        ended = commands.run(COMMANDS[target.command], folder)
        fault = ended.fault(must_fail=target.must_fail(name))
        if fault is None and ended.code == 0:
            fault = trained(folder, target.command)
        if fault is None:
            shutil.rmtree(folder)
        else:
            command = shlex.join(["rlcore", *COMMANDS[target.command]])
            faults.append(f"{name}: {fault}\n  cd {folder} && {command}\n{ended.output[-1500:]}")
    assert not faults, f"{len(faults)} mutations of {target.path}:\n" + "\n".join(faults[:20])
