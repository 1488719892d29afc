"""The folder that ranks write together is complete, or recognised as incomplete on all ranks."""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint import json_file, random_states, rank_files
from rlcore_kit.checkpoint.background_save import BackgroundSave
from rlcore_kit.checkpoint.rank_files import MANIFEST, RankManifest, RankPart, rank_file


class Saved(RankManifest):
    format: Literal[7] = 7


class Later(RankManifest):
    format: Literal[8] = 8


class WithMoments(Saved):
    moments: bool


FACTS = partial(Saved, shapes={"w": [4]}, schedule_step=3, optimizer=True)
RANDOM = random_states.collect()


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
    part = RankPart({"w": torch.arange(2.0) + 2 * rank, **RANDOM[0]}, {"w": [2 * rank, 2 * rank + 2]}, RANDOM[1])
    (saves.start if background else saves.save)(folder, part, FACTS)
    return saves.finish()


@pytest.mark.parametrize("background", [False, True])
def test_two_ranks_write_a_folder(tmp_path: Path, background: bool) -> None:
    ranks = Ranks()
    records = ranks.run(lambda rank: save(tmp_path, rank, ranks.gather(rank), background))
    assert [set(record) for record in records] == [{rank_file(0), MANIFEST}, {rank_file(1)}]
    manifest = rank_files.read_manifest(tmp_path, Saved)
    assert manifest.ranks == [{"w": [0, 2]}, {"w": [2, 4]}]
    assert manifest.files == {rank_file(rank): records[rank][rank_file(rank)] for rank in range(2)}
    for rank in range(2):
        rank_files.check_files(tmp_path, manifest, rank, 2)
    rank_files.check_shapes(tmp_path, manifest.shapes, {"w": torch.Size([4])})
    with pytest.raises(
        CheckpointError, match=r"another model: w has shape \[4\] in the checkpoint and \[5\] in the model"
    ):
        rank_files.check_shapes(tmp_path, manifest.shapes, {"w": (5,)})
    with pytest.raises(CheckpointError, match="has format 7, this rlcore reads 8"):
        rank_files.read_manifest(tmp_path, Later)
    with pytest.raises(CheckpointError, match="damaged: moments: Field required"):
        rank_files.read_manifest(tmp_path, WithMoments)
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
        rank_files.read_manifest(tmp_path, Saved)


def test_ranks_agree_on_an_error(tmp_path: Path) -> None:
    ranks, own = Ranks(), CheckpointError("a file is missing")
    outcomes = ranks.run(lambda rank: rank_files.agree(own if rank else None, tmp_path, ranks.gather(rank)))
    assert outcomes[1] is own
    assert "cannot be loaded on another rank: a file is missing" in str(outcomes[0])


def test_a_second_save_must_wait_for_the_first(tmp_path: Path) -> None:
    saves = BackgroundSave(0, lambda value: [value])
    part = RankPart({}, {}, "{}")
    saves.start(tmp_path / "a", part, FACTS)
    with pytest.raises(
        CheckpointError, match=r"cannot save to .*b: the save to .*a is unfinished; call finish_save first"
    ):
        saves.start(tmp_path / "b", part, FACTS)
    assert set(saves.finish()) == {rank_file(0), MANIFEST}
    assert saves.done()
    assert saves.finish() == {}
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["schedule_step"] == 3


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"schedule_step": -1}, "schedule_step: Input should be greater than or equal to 0"),
        ({"schedule_step": 10**30}, "schedule_step: Input should be less than 9223372036854775808"),
        ({"schedule_step": "3"}, "schedule_step: Input should be a valid integer"),
        ({"optimizer": 1}, "optimizer: Input should be a valid boolean"),
        ({"shapes": {"w": [-4]}}, "shapes.w.0: Input should be greater"),
        ({"shapes": [4]}, "shapes: Input should be an object"),
        ({"files": {"../x": {"size": 1, "sha256": "0" * 64}}}, "names a file outside the checkpoint"),
        ({"files": {"/x": {"size": 1, "sha256": "0" * 64}}}, "names a file outside the checkpoint"),
        ({"files": {"x": {"size": -1, "sha256": "0" * 64}}}, "files.x.size: Input should be greater"),
        ({"files": {"x": {"size": 1, "sha256": "abc"}}}, "files.x.sha256: String should match"),
        ({"files": {"x" * 9000: {}}}, "String should have at most 4096 characters"),
        ({"ranks": []}, "ranks: Value should have at least 1 item"),
        ({"ranks": [{}, {}]}, "parts of 2 ranks, but no file rank-00001.safetensors"),
        ({"other": 1}, "other: Extra inputs are not permitted"),
    ],
)
def test_a_manifest_that_does_not_fit_is_damaged(tmp_path: Path, entries: dict[str, Any], reason: str) -> None:
    record = {rank_file(0): {"size": 1, "sha256": "0" * 64}}
    good = {"format": 7, "shapes": {}, "schedule_step": 0, "optimizer": True, "files": record, "ranks": [{}]}
    (tmp_path / MANIFEST).write_text(json.dumps(good))
    assert rank_files.read_manifest(tmp_path, Saved).ranks == [{}]
    (tmp_path / MANIFEST).write_text(json.dumps(good | entries))
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged: .*{re.escape(reason)}") as raised:
        rank_files.read_manifest(tmp_path, Saved)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b"NaN", b"1" * 5000])
def test_a_manifest_must_be_a_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
        rank_files.read_manifest(tmp_path, Saved)


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file, what in ((tmp_path / "pipe", "not a regular file"), (Path("/dev/zero"), "not a regular file")):
        with pytest.raises(CheckpointError, match=what):
            json_file.read(file, Saved)
    with pytest.raises(CheckpointError, match="is a folder"):
        json_file.read(tmp_path, Saved)
    monkeypatch.setattr(json_file, "LIMIT", 1 << 20)
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(CheckpointError, match="is larger than 1 MiB"):
        json_file.read(tmp_path / "large", Saved)
    for name in (rank_file(0), MANIFEST):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        rank_files.read_manifest(tmp_path, Saved)


def damaged_states() -> list[tuple[dict[str, torch.Tensor], str]]:
    states, text = random_states.collect()
    plain = json.loads(text)
    return [
        ({}, text),
        (states | {"random/torch": torch.zeros(3)}, text),
        (states | {"random/numpy": torch.full((624,), -1)}, text),
        (states | {"random/numpy": torch.zeros(3, dtype=torch.int64)}, text),
        *((states, broken) for broken in ("", "[]", "{}", '{"python": 3}')),
        *((states, json.dumps(plain | {"python": python})) for python in ([3, [1, 2], None], [9, [0] * 625, None])),
        (states, json.dumps(plain | {"numpy": ["PCG64", 0, 0, 0.0]})),
    ]


@pytest.mark.parametrize("case", range(len(damaged_states())))
def test_random_states_that_no_generator_accepts_are_refused(case: int) -> None:
    states, text = damaged_states()[case]
    with pytest.raises(CheckpointError, match=r"^the file"):
        random_states.checked(states, text, "the file")


def test_random_states_are_restored() -> None:
    states, text = random_states.collect()

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    expected = draw()
    random_states.restore(random_states.checked(states, text, "the file"))
    assert draw() == expected
