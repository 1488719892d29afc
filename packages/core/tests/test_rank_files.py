"""Checkpoint folders that ranks write together: complete or recognised as incomplete, on all ranks alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.checkpoint import rank_files
from rlcore.checkpoint.background_save import BackgroundSave
from rlcore.checkpoint.rank_files import MANIFEST, RankPart, rank_file
from rlcore.errors import CheckpointError

FACTS = {"format": 7, "shapes": {"w": [4]}, "step": 3}


class Ranks:
    """Two ranks on threads, with a `gather` between them."""

    def __init__(self) -> None:
        self._values: list[Any] = [None, None]
        self._barrier = threading.Barrier(2, timeout=60)

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def exchange(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            values = list(self._values)
            self._barrier.wait()
            return values

        return exchange

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return [future.result() for future in [pool.submit(attempt, work, rank) for rank in range(2)]]


def attempt(work: Callable[[int], Any], rank: int) -> Any:
    try:
        return work(rank)
    except CheckpointError as error:
        return error


def save(folder: Path, rank: int, gather: Any, background: bool) -> dict[str, Any]:
    saves = BackgroundSave(rank, gather)
    part = RankPart({"w": torch.arange(2.0) + 2 * rank}, {"w": [2 * rank, 2 * rank + 2]}, "{}")
    (saves.start if background else saves.save)(folder, part, FACTS)
    return saves.finish()


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_of_two_ranks(tmp_path: Path, background: bool) -> None:
    ranks = Ranks()
    records = ranks.run(lambda rank: save(tmp_path, rank, ranks.gather(rank), background))
    assert [set(record) for record in records] == [{rank_file(0), MANIFEST}, {rank_file(1)}]
    manifest = rank_files.read_manifest(tmp_path, 7, ["step"])
    assert manifest["ranks"] == [{"w": [0, 2]}, {"w": [2, 4]}]
    assert manifest["files"] == {rank_file(rank): records[rank][rank_file(rank)] for rank in range(2)}
    for rank in range(2):
        rank_files.check_files(tmp_path, manifest, rank, 2)
    rank_files.check_shapes(tmp_path, manifest["shapes"], {"w": torch.Size([4])})
    with pytest.raises(CheckpointError, match=r"another model: w has shape \[4\] there and \[5\] here"):
        rank_files.check_shapes(tmp_path, manifest["shapes"], {"w": (5,)})
    with pytest.raises(CheckpointError, match="format 7, this version reads 8"):
        rank_files.read_manifest(tmp_path, 8, [])
    with pytest.raises(CheckpointError, match="damaged: KeyError: 'moments'"):
        rank_files.read_manifest(tmp_path, 7, ["moments"])
    content = bytearray((tmp_path / rank_file(1)).read_bytes())
    content[-1] ^= 1
    (tmp_path / rank_file(1)).write_bytes(content)
    rank_files.check_files(tmp_path, manifest, 0, 2)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        rank_files.check_files(tmp_path, manifest, 1, 2)


def test_no_manifest_if_one_rank_could_not_write(tmp_path: Path) -> None:
    ranks = Ranks()
    ranks.run(lambda rank: save(tmp_path, rank, ranks.gather(rank), background=False))
    (tmp_path / rank_file(1)).unlink()
    (tmp_path / rank_file(1)).mkdir()  # where a file should be
    outcomes = ranks.run(lambda rank: save(tmp_path, rank, ranks.gather(rank), background=True))
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert all("rank 1: cannot write" in str(outcome) for outcome in outcomes)
    assert not (tmp_path / MANIFEST).exists(), "that of the checkpoint before it would lie"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        rank_files.read_manifest(tmp_path, 7, [])


def test_ranks_agree_on_an_error(tmp_path: Path) -> None:
    ranks, own = Ranks(), CheckpointError("a file is missing")
    outcomes = ranks.run(lambda rank: rank_files.agree(own if rank else None, tmp_path, ranks.gather(rank)))
    assert outcomes[1] is own
    assert "cannot be loaded on another rank: a file is missing" in str(outcomes[0])


def test_one_save_at_a_time(tmp_path: Path) -> None:
    saves = BackgroundSave(0, lambda value: [value])
    part = RankPart({}, {}, "{}")
    saves.start(tmp_path / "a", part, FACTS)
    with pytest.raises(CheckpointError, match=r"cannot save to .*b: finish_save has not been called for .*a"):
        saves.start(tmp_path / "b", part, FACTS)
    assert set(saves.finish()) == {rank_file(0), MANIFEST}
    assert saves.done()
    assert saves.finish() == {}
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["step"] == 3
