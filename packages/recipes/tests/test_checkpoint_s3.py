"""Checkpoints on an S3 server, through the client that an ``s3://`` URL gets."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from pydantic import Field

from rlcore.config import Config, load_config
from rlcore.controller import LocalExecutor
from rlcore.engines import TrainEngine
from rlcore.errors import CheckpointError
from rlcore_recipes.checkpoint import MANIFEST, CheckpointManager, RunState, node_folder
from rlcore_recipes.checkpoint.manifest import MARK
from rlcore_recipes.checkpoint.storage import open_storage
from rlcore_recipes.run.loop import train
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.settings import ControllerSettings

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not
from test_train_loop import Number, RunConfig, lines, make


class Value(Number):
    """A model of two files."""

    def save(self, path: Path) -> None:
        super().save(path)
        (path / "more").mkdir()
        (path / "more" / "data").write_bytes(bytes(1000))


def group(engine: Value) -> dict[str, Any]:
    return {"actor": LocalExecutor().workers(TrainEngine, engine, "actor")}  # type: ignore[type-abstract]


def state(step: int) -> RunState:
    return RunState(recipe="test", step=step, run_id="id", parts={})


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def root(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in a bucket, for a client without anything left of other tests."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    monkeypatch.setattr(node_folder, "_held", {})
    s3().makedirs("bucket", exist_ok=True)
    return f"s3://bucket/{tmp_path.name}/run"


def s3() -> Any:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return fsspec.filesystem("s3")


def found_at(root: str) -> set[str]:
    path = root.removeprefix("s3://")
    return {name.removeprefix(f"{path}/") for name in s3().find(path)}


def test_a_run_goes_on_from_a_bucket(root: str, tmp_path: Path) -> None:
    keys = ("save_freq=1", "keep_checkpoints=2", f"checkpoint_dir={root}")
    whole, model = make(tmp_path / "whole", "save_freq=1")
    train(whole)
    train(make(tmp_path / "parts", *keys, steps=3)[0])
    assert {name.split("/")[0] for name in found_at(root)} == {"step-000002", "step-000003"}
    s3().pipe_file(f"{root}/step-000003/actor/value", b"damaged")
    second, continued = make(tmp_path / "parts", *keys)
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint: .*step-000003"):
        train(second)
    assert continued.value == model.value
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3, 4]
    assert not [path for path in (tmp_path / "disk").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not (tmp_path / "parts" / "checkpoints").exists()


@pytest.mark.parametrize("at", ["actor/value", "state.json", MANIFEST])
def test_a_process_that_is_killed_while_it_uploads(root: str, at: str) -> None:
    manager = CheckpointManager(root)
    manager.save(1, group(Value(value=1)), state(1))
    child = os.fork()
    if child == 0:  # its own client is killed when it is to send that file
        try:
            kill_when_sending(at)
            CheckpointManager(root).save(2, group(Value(value=2)), state(2))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = {name for name in found_at(root) if name.startswith("step-000002")}
    assert f"step-000002/{MARK}" in left
    assert f"step-000002/{MANIFEST}" not in left
    engine = Value(value=0)
    manager = CheckpointManager(root)
    found = manager.resume_from("auto", group(engine))
    assert found is not None
    manager.load(found, group(engine))
    assert engine.value == 1
    assert {name.split("/")[0] for name in found_at(root)} == {"step-000001"}


def kill_when_sending(name: str) -> None:
    node_folder._held.clear()
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()
    send = kind._call_s3

    async def call(system: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "put_object" and options.get("Key", "").endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)
        return await send(system, method, *arguments, **options)

    kind._call_s3 = call


class Settings(RunConfig):
    controller: ControllerSettings = Field(default_factory=ControllerSettings)


def refused(tmp_path: Path, url: str) -> str:
    """The error of a run that must end before it does any work."""
    keys = [f"trainer.out_dir={tmp_path}/out", "trainer.save_freq=1", f"trainer.checkpoint_dir={url}"]

    def work(config: Config) -> None:
        pytest.fail("the run began")

    with pytest.raises(CheckpointError) as raised:
        restarting(work)(load_config(Settings, None, keys))
    assert not (tmp_path / "out").exists()
    return str(raised.value)


def test_a_bucket_that_is_not_there_is_noticed_before_the_work_and_not_made(root: str, tmp_path: Path) -> None:
    message = refused(tmp_path, "s3://no-such-bucket/run")
    assert message.startswith("cannot write checkpoints to s3://no-such-bucket/run: FileNotFoundError")
    assert not s3().exists("no-such-bucket")


def test_wrong_credentials_are_noticed_before_the_work(
    root: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CheckpointManager(root).save(1, group(Value(value=1)), state(1))
    set_free_requests(server, "0")
    try:
        s3()
        message = refused(tmp_path, root)
        assert message.startswith(f"cannot write checkpoints to {root}: PermissionError: The AWS Access Key Id")
    finally:
        set_free_requests(server, "inf")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3()
    assert "credentials" in refused(tmp_path, root)


def set_free_requests(server: str, count: str) -> None:
    """How many requests the server answers without looking at their credentials."""
    urllib.request.urlopen(
        urllib.request.Request(
            f"{server}/moto-api/reset-auth", data=count.encode(), headers={"Content-Type": "text/plain"}
        )
    ).close()


def test_a_folder_in_a_bucket_that_others_write_to(root: str) -> None:
    s3().pipe_file(f"{root}/step-000002/mine.txt", b"mine")
    storage = open_storage(root)
    storage.check_writable()
    assert found_at(root) == {"step-000002/mine.txt"}
    with pytest.raises(CheckpointError, match="step-000002 exists but is not a checkpoint"):
        CheckpointManager(root).check_room(1, 2)
