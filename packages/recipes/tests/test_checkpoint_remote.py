"""Checkpoints at a URL: processes without a shared disk, a store that cannot rename."""

from __future__ import annotations

import builtins
import json
import multiprocessing.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from rlcore import plugins
from rlcore.controller import LocalExecutor
from rlcore.engines import ModelSettings, OptimSettings, TrainEngine, TrainEngineSpec
from rlcore.errors import CheckpointError
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import WeightedLogprobs, exported, make_batch
from rlcore_recipes.checkpoint import MANIFEST, CheckpointManager, RunState, node_folder
from rlcore_recipes.checkpoint.manifest import MARK


def state(step: int) -> RunState:
    return RunState(recipe="test", step=step, run_id="id", parts={})


class Bucket(LocalFileSystem):
    """``bucket://`` and an absolute path: what several processes can reach, with an object store's limits."""

    protocol = "bucket"
    failing = ""  # a part of the names that cannot be written

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(part) for part in path]
        return LocalFileSystem._strip_protocol(str(path).removeprefix("bucket://"))

    def mv(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError("an object store cannot rename")

    mv_file = rename = move = mv

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        if self.failing and self.failing in rpath:
            raise RuntimeError("503 slow down")
        super().put_file(lpath, rpath, *arguments, **options)


fsspec.register_implementation("bucket", Bucket, clobber=True)


class Value:
    """An engine whose state is one number."""

    start_save = TrainEngine.start_save
    save_done = TrainEngine.save_done
    finish_save = TrainEngine.finish_save

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def save(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "value").write_text(str(self.value))
        (path / "more").mkdir()
        (path / "more" / "data").write_bytes(bytes([self.value]) * 1000)

    def load(self, path: Path) -> None:
        self.value = int((path / "value").read_text())
        assert (path / "more" / "data").read_bytes() == bytes([self.value]) * 1000


def group(engine: Value) -> dict[str, Any]:
    return {"actor": LocalExecutor().workers(Value, engine, "actor")}


@pytest.fixture(params=["bucket", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "bucket":
        yield f"bucket://{tmp_path}/bucket/run"
        return
    memory = fsspec.filesystem("memory")
    yield f"memory://{tmp_path.name}/run/"
    memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture(autouse=True)
def own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    monkeypatch.setattr(node_folder, "_held", {})
    return tmp_path / "disk"


def files_of(root: str) -> set[str]:
    system, path = fsspec.core.url_to_fs(root)
    return {name[len(path.rstrip("/")) + 1 :] for name in system.find(path)}


def steps_of(root: str) -> list[str]:
    return sorted({name.split("/")[0] for name in files_of(root)})


def left_on(disk: Path) -> list[Path]:
    return [path for path in disk.rglob("*") if path.is_file() and path.suffix != ".lock"]


def saved(root: str, *steps: int, **options: Any) -> CheckpointManager:
    manager = CheckpointManager(root, **options)
    for step in steps:
        manager.start(step, group(Value(step)), state(step))
        manager.finish()
    return manager


def test_what_is_saved_is_loaded_again(root: str, own_disk: Path) -> None:
    manager, engine = saved(root, 7), Value()
    assert manager.newest == f"{root.rstrip('/')}/step-000007"
    names = {"state.json", "manifest.json", "actor/value", "actor/more/data"}
    assert files_of(root) == {f"step-000007/{name}" for name in names}
    found = manager.resume_from("auto", group(engine))
    assert found is not None
    assert found.state.step == 7
    manager.load(found, group(engine))
    assert engine.value == 7
    assert left_on(own_disk) == []
    again = CheckpointManager(root + "-other").resume_from(found.location.path, group(engine))
    assert again is not None
    assert again.location == found.location


def test_the_newest_and_the_best_stay(root: str) -> None:
    manager = CheckpointManager(root, 1, best_metric="acc")
    for step, accuracy in enumerate([0.5, 0.9, 0.1], 1):
        manager.save(step, group(Value(step)), state(step), {"acc": accuracy})
    assert steps_of(root) == ["step-000002", "step-000003"]
    assert manager.best() == f"{root.rstrip('/')}/step-000002"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("actor/value", b"9", "the contents of actor/value have changed"),
        ("actor/value", b"short", "actor/value has 5 bytes instead of 1"),
        ("actor/value", None, "lacks actor/value"),
        (MANIFEST, b"", "manifest.json is damaged"),
        ("actor/extra", b"x", "holds actor/extra, which its manifest.json does not list"),
        (MANIFEST, None, "has no manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(root: str, file: str, content: bytes | None, reason: str) -> None:
    saved(root, 1, 2)
    system, path = fsspec.core.url_to_fs(root)
    if content is None:
        system.rm_file(f"{path.rstrip('/')}/step-000002/{file}")
    else:
        system.pipe_file(f"{path.rstrip('/')}/step-000002/{file}", content)
    manager, engine = CheckpointManager(root), Value()
    with pytest.warns(UserWarning, match=f"skipped a damaged checkpoint: .*{reason}"):
        found = manager.resume_from("auto", group(engine))
    assert found is not None
    manager.load(found, group(engine))
    assert engine.value == 1
    with pytest.raises(CheckpointError, match=reason):
        manager.resume_from(f"{manager.root}/step-000002", group(engine))


def test_an_upload_that_stopped_is_deleted_and_foreign_files_are_not(root: str) -> None:
    saved(root, 1, 2)
    system, path = fsspec.core.url_to_fs(root)
    folder = f"{path.rstrip('/')}/step-000002"
    system.rm_file(f"{folder}/{MANIFEST}")
    system.pipe_file(f"{folder}/{MARK}", b"")
    system.makedirs(f"{path.rstrip('/')}/step-000003", exist_ok=True)
    system.pipe_file(f"{path.rstrip('/')}/step-000003/mine.txt", b"mine")
    manager = CheckpointManager(root)
    assert {name for name in files_of(root) if "00002" in name or "00003" in name} == {"step-000003/mine.txt"}
    with pytest.raises(CheckpointError, match="step-000003 exists but is not a checkpoint"):
        manager.save(3, group(Value()), state(3))
    assert "step-000003/mine.txt" in files_of(root)


def test_a_step_that_is_repeated_replaces_its_checkpoint(root: str) -> None:
    saved(root, 1)
    manager, engine = CheckpointManager(root), Value()
    manager.save(1, group(Value(5)), state(1))
    found = manager.latest(group(engine))
    assert found is not None
    manager.load(found, group(engine))
    assert engine.value == 5


def test_an_upload_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_disk: Path) -> None:
    root = f"bucket://{tmp_path}/bucket"
    manager = saved(root, 1)
    for name in ("actor/more/data", "manifest.json"):
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "failing", name)
            patch.setattr(Bucket, "pipe_file", pipe_by_putting)
            with pytest.raises(CheckpointError, match=f"cannot write {root}/step-000002/{name}: RuntimeError: 503"):
                manager.save(2, group(Value(2)), state(2))
        assert left_on(own_disk) == []
        assert manager.newest == f"{root}/step-000001"
    assert files_of(root) - {f"step-000002/{MARK}"} == {name for name in files_of(root) if "step-000001" in name}
    CheckpointManager(root)
    assert steps_of(root) == ["step-000001"]


def pipe_by_putting(system: Bucket, path: str, value: bytes, **options: Any) -> None:
    if system.failing and system.failing in path:
        raise RuntimeError("503 slow down")
    with system.open(path, "wb") as file:
        file.write(value)


@pytest.mark.parametrize(
    ("url", "hint"), [("s3://b/c", r"rlcore-recipes\[s3\]"), ("gs://b/c", r"rlcore-recipes\[gcs\]")]
)
def test_a_missing_package_names_the_extra(url: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] in ("s3fs", "gcsfs"):
            raise ImportError(f"no {name}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=hint):
        CheckpointManager(url)


def test_an_unknown_protocol(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a URL that fsspec supports"):
        CheckpointManager("nonsense://x")


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, own_disk: Path) -> None:
    root = f"bucket://{tmp_path}/bucket"
    saved(root, 1)
    manifest = tmp_path / "bucket" / "step-000001" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"]["actor/../../../evil"] = content["files"]["actor/value"]
    manifest.write_text(json.dumps(content))
    shutil.copy(tmp_path / "bucket" / "step-000001" / "actor" / "value", tmp_path / "evil")
    with pytest.raises(CheckpointError, match="names a file outside the checkpoint"):
        CheckpointManager(root).resume_from(f"{root}/step-000001", group(Value()))
    assert left_on(own_disk) == []


def test_what_a_killed_process_left_on_the_disk_is_deleted(own_disk: Path) -> None:
    dead = node_folder.base() / "save-dead"
    dead.mkdir()
    (dead / "rank-00000.safetensors").write_text("much")
    dead.with_suffix(".lock").touch()
    mine = node_folder.outbox()
    assert {path.name for path in node_folder.base().iterdir()} == {mine.name, f"{mine.name}.lock", "outbox.lock"}
    node_folder._delete_left_over()  # another process, while this one lives
    assert mine.is_dir()


# --- several processes -----------------------------------------------------------------------------------------------


def alone_on_its_disk(tmp: Path, rank: int) -> None:
    multiprocessing.util.get_temp_dir()  # of sockets, whose paths must be short: chosen before
    tempfile.tempdir = str(tmp / f"disk-{rank}")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    node_folder._held.clear()


def engine_of(model: Path) -> TrainEngine:
    plugin = plugins.get("rlcore.train_engines", "fsdp")
    settings = plugin.config_class()(device="cpu")
    optim = OptimSettings(lr=1e-2)
    return plugin.build(TrainEngineSpec(ModelSettings(path=str(model)), settings, optim=optim, max_tokens=64))


def train_and_save(model: Path, tmp: Path, root: str) -> tuple[dict[str, Any], list[str]]:
    """The weights at the checkpoint; the files that this rank had on its disk before they were uploaded."""
    executor, engine = LocalExecutor(timeout_s=120), engine_of(model)
    alone_on_its_disk(tmp, engine.dp_rank)
    group = {"actor": executor.workers(TrainEngine, engine, "actor")}  # type: ignore[type-abstract]
    manager = CheckpointManager(root, ranks=executor)
    for step in (1, 2):
        group["actor"].train(make_batch(seed=step), WeightedLogprobs())
        manager.start(step, group, state(step))
        expected = exported(engine)
    group["actor"].train(make_batch(seed=9), WeightedLogprobs())
    executor.barrier()
    while not all(executor.all_gather(engine.save_done())):
        continue
    here = sorted(path.name for path in node_folder.outbox().rglob("*") if path.is_file())
    manager.finish()
    assert not left_on(Path(str(tempfile.tempdir)))
    return expected, here


def continue_from_newest(model: Path, tmp: Path, root: str) -> tuple[dict[str, Any], int]:
    executor, engine = LocalExecutor(timeout_s=120), engine_of(model)
    alone_on_its_disk(tmp, engine.dp_rank)
    group = {"actor": executor.workers(TrainEngine, engine, "actor")}  # type: ignore[type-abstract]
    manager = CheckpointManager(root, ranks=executor)
    found = manager.resume_from("auto", group)
    assert found is not None
    manager.load(found, group)
    assert not left_on(Path(str(tempfile.tempdir)))
    return exported(engine), found.state.step


def test_ranks_without_a_shared_disk(tmp_path: Path) -> None:
    """Two ranks save, two and one continue; a file that is damaged for one rank sends both to the one before."""
    model, root = tiny_model(tmp_path / "model", intermediate_size=63), f"bucket://{tmp_path}/bucket"
    pool = RankPool(2)
    try:
        saves = pool.run(train_and_save, model, tmp_path, root, timeout=240)
        assert [here for _, here in saves] == [["rank-00000.safetensors"], ["rank-00001.safetensors"]]
        expected = saves[0][0]
        for weights, step in [
            *pool.run(continue_from_newest, model, tmp_path, root),
            continue_from_newest(model, tmp_path, root),
        ]:
            assert step == 2
            assert all(tensor.equal(expected[name]) for name, tensor in weights.items())
        shard = tmp_path / "bucket" / "step-000002" / "actor" / "rank-00001.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        assert [step for _, step in pool.run(continue_from_newest, model, tmp_path, root)] == [1, 1]
    finally:
        pool.close()
