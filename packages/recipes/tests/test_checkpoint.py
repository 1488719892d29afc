"""Checkpoints survive crashes, full disks and damage."""

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from rlcore.controller import LocalExecutor
from rlcore.engines import TrainEngine
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint.json_file import JsonFile
from rlcore_kit.checkpoint.rank_files import file_record
from rlcore_recipes.checkpoint import MANIFEST, CheckpointManager, RunState, folder, verify
from rlcore_recipes.checkpoint.storage import open_storage


class Position(JsonFile):
    drawn: int = Field(ge=0)


def state(step: int) -> RunState:
    return RunState(recipe="test", step=step, run_id="id", parts={})


class Files:
    """An engine that writes with a function and reads everything; it saves in the foreground and knows no checksums."""

    start_save = TrainEngine.start_save
    save_done = TrainEngine.save_done
    finish_save = TrainEngine.finish_save

    def __init__(self, write: Callable[[Path], None]) -> None:
        self.write = write
        self.loaded: dict[str, bytes] = {}

    def save(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.write(path)

    def load(self, path: Path) -> None:
        self.loaded = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def engines(write: Callable[[Path], None], executor: LocalExecutor | None = None) -> dict[str, Any]:
    return {"actor": (executor or LocalExecutor()).workers(Files, Files(write), "actor")}


def weights(step: int) -> dict[str, Any]:
    def write(folder: Path) -> None:
        (folder / "shard.bin").write_bytes(bytes([step]) * 1000)
        (folder / ".metadata").write_text(str(step))

    return engines(write)


def load_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def latest(manager: CheckpointManager) -> Path | None:
    found = manager.latest()
    return None if found is None else Path(found.location.path)


def saved(root: Path, *steps: int, **options: Any) -> CheckpointManager:
    manager = CheckpointManager(root, **options)
    for step in steps:
        manager.save(step, weights(step), state(step))
    return manager


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    manager = saved(tmp_path / "new" / "root", 7)
    path = latest(manager)
    assert path is not None
    assert path == tmp_path / "new" / "root" / "step-000007"
    assert load_state(path)["step"] == 7
    assert (path / "actor" / "shard.bin").read_bytes() == bytes([7]) * 1000
    assert set(json.loads((path / MANIFEST).read_text())["files"]) == {
        "actor/shard.bin",
        "actor/.metadata",
        "state.json",
    }


def test_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = latest(saved(Path("runs/checkpoints"), 1))
    assert path == tmp_path / "runs/checkpoints/step-000001"
    verify(path)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest(CheckpointManager(tmp_path / "none")) is None
    assert not (tmp_path / "none").exists()


def test_the_newest_stay(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_null_keeps_all_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=None)
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_the_best_stays_too(tmp_path: Path, mode: Any, best: int) -> None:
    manager = CheckpointManager(tmp_path, 1, best_metric="acc", best_mode=mode)
    for step, value in enumerate([0.5, 0.9, 0.1, float("nan"), 0.6], 1):
        manager.save(step, weights(step), state(step), {"acc": value, "loss": 1.0})
    manager.save(6, weights(6), state(6))
    assert manager.best() == str(tmp_path / f"step-{best:06d}")
    assert names(tmp_path) == [f"step-{best:06d}", "step-000006"]


def truncate(path: Path) -> None:
    (path / "actor" / "shard.bin").write_bytes(b"short")


def flip(path: Path) -> None:
    (path / "actor" / "shard.bin").write_bytes(bytes([9]) * 1000)


def remove(path: Path) -> None:
    (path / "actor" / "shard.bin").unlink()


def empty_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("")


def no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def newer_format(path: Path) -> None:
    (path / MANIFEST).write_text(json.dumps({"format": 99, "files": {}, "metrics": {}}))


def manifest(**entries: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(content | entries))

    change.__name__ = f"manifest with {entries}"
    return change


def of_another_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000001"), path)


def more_than_listed(path: Path) -> None:
    (path / "actor" / "rank-00001.safetensors").write_text("x")


def files(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        change(listed)
        manifest(files=listed)(path)

    return changed


def plain(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The state changed, with a checksum that fits."""

    def changed(path: Path) -> None:
        content = load_state(path)
        change(content)
        (path / "state.json").write_text(json.dumps(content))
        files(lambda listed: listed.update({"state.json": file_record(path / "state.json")}))(path)

    return changed


def pipe(name: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return replace


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "actor/shard.bin has 5 bytes instead of 1000"),
        (flip, "the contents of actor/shard.bin have changed"),
        (remove, "lacks actor/shard.bin"),
        (empty_manifest, "manifest.json is damaged: Invalid JSON"),
        (no_manifest, "has no manifest.json"),
        (newer_format, "has format 99, this rlcore reads 1"),
        (of_another_step, "manifest.json is damaged: it is of step 1"),
        (more_than_listed, "holds actor/rank-00001.safetensors, which its manifest.json does not list"),
        (manifest(step=-2), "step: Input should be greater than or equal to 0"),
        (manifest(metrics=[1]), "metrics: Input should be an object"),
        (manifest(metrics={"score": float("nan")}), "metrics.score: Input should be a finite number"),
        (manifest(files={}), "lists no state.json"),
        (manifest(surprise=1), "surprise: Extra inputs are not permitted"),
        (files(lambda listed: listed.update({"../x": listed["state.json"]})), "names a file outside the checkpoint"),
        (files(lambda listed: listed.update({"x": {"size": 1}})), "files.x.sha256: Field required"),
        (plain(lambda state: state.update(step=1)), "it is of step 1, the manifest of 2"),
        (plain(lambda state: state.update(parts=[])), "parts: Input should be an object"),
        (plain(lambda state: state.pop("recipe")), "recipe: Field required"),
        (
            plain(lambda state: state["parts"].update(data={"drawn": -1})),
            "parts.data is damaged: drawn: Input should be",
        ),
        (plain(lambda state: state["parts"].update(data={"drawn": "many"})), "parts.data is damaged: drawn: Input"),
        (pipe("manifest.json"), "is not a regular file"),
        (pipe("state.json"), "lacks state.json"),
        (pipe("actor/shard.bin"), "lacks actor/shard.bin"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, damage: Any, reason: str) -> None:
    saved(tmp_path, 1, 2)
    damage(tmp_path / "step-000002")
    manager = CheckpointManager(tmp_path, best_metric="acc", parts={"data": Position})
    with pytest.warns(UserWarning, match=f"skipped a damaged checkpoint: .*{reason}"):
        assert latest(manager) == tmp_path / "step-000001"
    manager.save(3, weights(3), state(3))
    assert latest(manager) == tmp_path / "step-000003"


def test_damaged_checkpoints_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    saved(tmp_path, 1, 5, 9)
    truncate(tmp_path / "step-000005")
    truncate(tmp_path / "step-000009")
    saved(tmp_path, 1)
    manager = CheckpointManager(tmp_path)
    with warnings.catch_warnings(record=True, action="always") as caught:
        latest(manager)
    assert [str(warning.message).split(": ")[0] for warning in caught] == ["skipped a damaged checkpoint"] * 2
    manager.save(6, weights(6), state(6))
    verify(tmp_path / "step-000001")
    verify(tmp_path / "step-000006")


def test_a_step_that_is_repeated_replaces_its_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    truncate(tmp_path / "step-000001")
    saved(tmp_path, 1)
    verify(tmp_path / "step-000001")
    assert names(tmp_path) == ["step-000001"]


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("step-000002", "notes", "step-2.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    manager = saved(tmp_path, 1, keep=1)
    with pytest.raises(CheckpointError, match=r"step-000002 exists but is not a checkpoint .*move it away"):
        manager.save(2, weights(2), state(2))
    manager.save(3, weights(3), state(3))
    manager.save(4, weights(4), state(4))
    assert names(tmp_path) == ["notes", "step-000002", "step-000004", "step-2.old"]
    assert all((tmp_path / name / "mine.txt").exists() for name in ("notes", "step-000002", "step-2.old"))


def full_disk(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000002.*: .*No space left"):
        manager.save(2, engines(full_disk), state(2))
    for name in ("records_of", "flush"):
        with monkeypatch.context() as patch:
            patch.setattr(folder, name, full_disk)
            with pytest.raises(CheckpointError, match="No space left"):
                manager.save(2, weights(2), state(2))
    assert names(tmp_path) == ["step-000001"]
    assert latest(manager) == tmp_path / "step-000001"


def test_a_failed_replacement_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = saved(tmp_path, 1)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            full_disk()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        manager.save(1, weights(5), state(1))
    assert (tmp_path / "step-000001" / "actor" / "shard.bin").read_bytes() == bytes([1]) * 1000
    verify(tmp_path / "step-000001")


def test_errors_of_ours_keep_their_type(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise ZeroDivisionError("bug")

    with pytest.raises(ZeroDivisionError):
        saved(tmp_path, 1).save(2, engines(broken), state(2))
    assert names(tmp_path) == ["step-000001"]


def test_leftovers_of_a_crash_are_cleaned(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000003.tmp")
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000002.old")
    os.rename(tmp_path / "step-000001", tmp_path / "step-000001.old")  # a crash between the two renames
    manager = CheckpointManager(tmp_path)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    verify(tmp_path / "step-000001")
    assert latest(manager) == tmp_path / "step-000002"


def test_what_rlcore_did_not_write_is_not_cleaned(tmp_path: Path) -> None:
    """Folders that only look like leftovers stay, and are in the way of a checkpoint of that step."""
    saved(tmp_path, 1)
    for name in ("step-000002.tmp", "step-000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-000003.tmp").symlink_to(tmp_path / "elsewhere")
    manager = CheckpointManager(tmp_path)
    for step, name in ((1, "step-000001.old"), (2, "step-000002.tmp"), (3, "step-000003.tmp")):
        with pytest.raises(CheckpointError, match=f"{name} exists but is not a checkpoint .*move it away"):
            manager.save(step, weights(step), state(step))
    assert names(tmp_path) == ["elsewhere", "step-000001", "step-000001.old", "step-000002.tmp", "step-000003.tmp"]
    assert (tmp_path / "step-000002.tmp" / "mine.txt").exists()


def test_a_deletion_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2, keep=2)
    manager = CheckpointManager(tmp_path, 1)
    with monkeypatch.context() as patch:  # the manifest is gone, the rest is not
        patch.setattr(shutil, "rmtree", full_disk)
        with pytest.warns(UserWarning, match="cannot delete the old checkpoint"):
            manager.save(3, weights(3), state(3))
    left = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert len(left) == 2
    for path in left:
        (path / MANIFEST).unlink(missing_ok=True)
    CheckpointManager(tmp_path)
    assert names(tmp_path) == ["step-000003"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
@pytest.mark.parametrize("name", ["step-000005", "step-000005.tmp", "step-000005.old"])
def test_a_place_that_is_taken_is_seen_before_training(tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    manager = saved(tmp_path, 3)
    make(tmp_path / name)
    (tmp_path / name / "mine").touch() if make is Path.mkdir else None
    manager.check_room(5, 9)
    manager.check_room(3, 4)
    with pytest.raises(CheckpointError, match=f"{name} exists but is not a checkpoint"):
        manager.check_room(3, 9)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints to .*file"):
        open_storage(tmp_path / "file" / "folder").check_writable()
    open_storage(tmp_path / "new" / "folder").check_writable()
    assert not (tmp_path / "new").exists()


def test_which_checkpoint_a_run_goes_on_from(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def choose(manager: CheckpointManager, choice: str) -> Path | None:
        found = manager.resume_from(choice)
        return None if found is None else Path(found.location.path)

    assert choose(CheckpointManager(root), "never") is None
    assert choose(CheckpointManager(root), "auto") is None
    manager = saved(root, 1, 2)
    assert choose(manager, "auto") == root / "step-000002"
    assert choose(manager, str(root / "step-000002")) == root / "step-000002"
    assert choose(manager, f"file://{root}/step-000002/") == root / "step-000002"
    with pytest.raises(CheckpointError, match=r"step-000002 belongs to an earlier run that resume=never"):
        choose(manager, "never")
    with pytest.raises(CheckpointError, match="step-000002 belongs to an earlier run"):
        choose(manager, str(root / "step-000001"))
    assert choose(CheckpointManager(tmp_path / "other"), str(root / "step-000001")) == root / "step-000001"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        choose(manager, str(root / "step-000009"))
    truncate(root / "step-000002")
    with pytest.raises(CheckpointError, match="5 bytes instead of 1000"):
        choose(manager, str(root / "step-000002"))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    manager, group = saved(tmp_path, 1), weights(0)
    found = manager.resume_from("auto", group)
    assert found is not None
    manager.load(found, group)
    assert group["actor"].loaded == {"shard.bin": bytes([1]) * 1000, ".metadata": b"1"}


KILLER = """
import os, signal, sys, time
from pathlib import Path
from rlcore.controller import LocalExecutor
from rlcore.engines import TrainEngine
from rlcore_recipes.checkpoint import CheckpointManager, RunState

class Files:
    start_save, save_done, finish_save = TrainEngine.start_save, TrainEngine.save_done, TrainEngine.finish_save

    def save(self, folder):
        folder.mkdir(parents=True)
        for part in range(20):
            (folder / f"{part}.bin").write_bytes(bytes([step % 256]) * 100_000)

def state(step):
    return RunState(recipe="test", step=step, run_id="id", parts={})

for attempt in range(12):
    root = Path(sys.argv[1]) / str(attempt)
    child = os.fork()
    if child == 0:
        manager = CheckpointManager(root, keep=1)
        for step in range(1, 1_000_000):
            manager.save(step, {"actor": LocalExecutor().workers(TrainEngine, Files(), "actor")}, state(step))
    while not any(root.glob("step-??????")):
        time.sleep(0.002)
    time.sleep(0.0137 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_process_killed_at_any_time_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], check=True, timeout=120)
    unfinished = 0
    for root in tmp_path.iterdir():
        unfinished += any(root.glob("*.tmp"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = latest(CheckpointManager(root))
        assert path is not None
        step = load_state(path)["step"]
        assert (path / "actor" / "19.bin").read_bytes() == bytes([step % 256]) * 100_000
        assert not list(root.glob("*.tmp"))
    assert unfinished > 0  # some were killed in the middle of writing


RANKS = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from rlcore.controller import LocalExecutor
from rlcore.engines import TrainEngine
from rlcore.errors import CheckpointError
from rlcore_recipes.checkpoint import CheckpointManager, RunState, verify

class Files:
    start_save, save_done, finish_save = TrainEngine.start_save, TrainEngine.save_done, TrainEngine.finish_save
    dp_size = 2

    def __init__(self, write):
        self.write = write

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder)

rank, root = int(sys.argv[1]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
executor = LocalExecutor(timeout_s=60)
state = lambda step: RunState(recipe="test", step=step, run_id="id", parts={})
group = lambda write: {"actor": executor.workers(TrainEngine, Files(write), "actor")}
manager = CheckpointManager(root, ranks=executor)
manager.save(1, group(lambda folder: (folder / f"rank-{rank}").write_text("x")), state(1))
path = manager.latest().location.path
assert path == str(root / "step-000001"), path
verify(Path(path))
assert {"rank-0", "rank-1"} <= {file.name for file in (Path(path) / "actor").iterdir()}

def fail_on_one(folder):
    if rank == 1:
        raise OSError(28, "No space left on device")

try:
    manager.save(2, group(fail_on_one), RunState(recipe="r", step=2, run_id="i", parts={}))
except CheckpointError as error:
    print(error)
else:
    raise AssertionError("rank 1's failure was not noticed")
assert manager.latest().location.path == path
dist.barrier()
dist.destroy_process_group()
"""


def test_all_ranks_take_part_and_hear_of_a_failure(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "store"), str(tmp_path / "root")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    except subprocess.TimeoutExpired:
        hanging = [rank for rank, process in enumerate(processes) if process.poll() is None]
        pytest.fail(f"rank {hanging} did not end")
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "failed on rank 1: cannot write" in outputs[0]
    assert "step-000002.tmp/actor: [Errno 28]" in outputs[0]
    assert "No space left" in outputs[1]
    assert names(tmp_path / "root") == ["step-000001"]
