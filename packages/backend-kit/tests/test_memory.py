"""What is free on a device, by the files of Linux's control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlcore_kit.training import memory


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def left(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "membership").write_text(membership)
    return list(memory._left_in_groups(tmp_path / "cgroup", tmp_path / "membership"))


def test_limits_of_version_2_hold_for_all_groups_above(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root / "job", memory__max=1000, memory__current=700, memory__stat="anon 5\ninactive_file 200")
    group(root / "job/task", memory__max="max", memory__current=600, memory__stat="inactive_file 0")
    assert left(tmp_path, "0::/job/task\n") == [500]


def test_limits_of_version_1(tmp_path: Path) -> None:
    root = tmp_path / "cgroup/memory"
    files = {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 1100, "memory__stat": "total_inactive_file 50"}
    group(root / "job", **files)
    assert left(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n") == [0]


@pytest.mark.parametrize("membership", ["", "0::/not/mounted\n", "4:memory:/../elsewhere\n"])
def test_groups_that_cannot_be_read_limit_nothing(tmp_path: Path, membership: str) -> None:
    assert left(tmp_path, membership) == []


def test_the_memory_of_this_machine() -> None:
    device = torch.device("cpu")
    assert 0 < memory.free_memory(device) < 2**50
    assert memory.place_of(device) == memory.place_of(torch.device("cpu", 0))
