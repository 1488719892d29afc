"""Have a server load weights from a folder, by the endpoints of vLLM or SGLang, or by a command of the user."""

from __future__ import annotations

import fcntl
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import IO

from rlcore.engines.settings import ModelSettings
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, WorkerError
from rlcore_http.quirks import check_vllm_reload
from rlcore_http.settings import HTTPSettings
from rlcore_kit.model_folder.files import CONFIG, optional_file
from rlcore_kit.model_folder.writing import write_model_folder
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.weight_labels import UNKNOWN

POLL_S = 0.5
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")
MAX_OUTPUT = 400
"""Characters of the end of a command's output that a message quotes."""


class Reloads:
    """What one run gave to its servers; shared by all clients, so that a server that failed gets it again."""

    def __init__(self, settings: HTTPSettings, model: ModelSettings) -> None:
        self._settings, self._model = settings, model
        self._given: dict[str, tuple[Path, int] | None] = {}  # by URL; None while an update is not complete
        self._claims: dict[str, IO[str]] = {}

    def load_current(self, connection: Connection) -> int:
        """Have the server load the weights that it was given last, and return their version.

        Before the first update that is the run's model as version 0, because the server may hold the weights of an
        earlier run. What cannot work fails here.

        Raises:
            EngineError, WorkerError: see `reload`; another process updates the server.
        """
        settings, url = self._settings, connection.url
        if settings.reload == "none":
            return 0
        self._claim(url)
        if settings.reload == "vllm":
            with _endpoint(connection, settings):
                check_vllm_reload(connection, self._model)
        given = self._given.get(url, (source_folder(self._model), 0))
        if given is None:
            return UNKNOWN
        reload(connection, settings, *given)
        return given[1]

    def update(self, connection: Connection, buckets: Iterable[WeightBucket], version: int) -> None:
        """Write ``buckets`` to a model folder, and have the server load it.

        Raises:
            EngineError, WorkerError: see `reload`.
        """
        assert self._settings.weights_dir is not None
        self._given[connection.url] = None
        folder = write_folder(self._model, self._settings.weights_dir, connection.url, buckets)
        reload(connection, self._settings, folder, version)
        self._given[connection.url] = folder, version

    def _claim(self, url: str) -> None:
        """Lock the server's folder for this process: two that give it weights would disturb each other.

        The kernel unlocks it when the process ends.
        """
        if url in self._claims:
            return
        assert self._settings.weights_dir is not None
        self._settings.weights_dir.mkdir(parents=True, exist_ok=True)
        file = (self._settings.weights_dir / f"{_name(url)}.lock").open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise EngineError(
                f"another process gives {url} weights by way of {self._settings.weights_dir}: only one may. Under "
                "torchrun every process would; let one process generate, on a separate pool (controller.kind=ray, "
                "controller.placement.rollout)"
            ) from None
        self._claims[url] = file


def write_folder(model: ModelSettings, parent: Path, url: str, buckets: Iterable[WeightBucket]) -> Path:
    """Write a model folder with the weights in ``buckets`` for the server at ``url``, below ``parent``; return it.

    All files but the weights are copies of the files of ``model``. The weights of an earlier update are replaced.
    """
    source = source_folder(model)
    path = parent / _name(url)

    def copy_others(folder: Path, _: set[str]) -> None:
        for file in sorted(source.iterdir()):
            if file.is_file() and ".safetensors" not in file.name and file.suffix not in OTHER_WEIGHTS:
                copyfile(file, folder / file.name)

    write_model_folder((pair for bucket in buckets for pair in bucket.tensors), path, copy_others)
    return path.resolve()


def _name(url: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in url.partition("://")[2])


def source_folder(model: ModelSettings) -> Path:
    """Return the folder with the files of ``model``, in the cache if it comes from the Hub.

    Raises:
        EngineError: it has no configuration there.
    """
    file = optional_file(model, CONFIG)
    if file is None:
        raise EngineError(f"the model {model.path} has no {CONFIG}")
    return file.parent.resolve() if Path(model.path).expanduser().is_dir() else file.parent


def reload(connection: Connection, settings: HTTPSettings, folder: Path, version: int) -> None:
    """Have the server behind ``connection`` serve the weights in ``folder``.

    Raises:
        EngineError: the server has no endpoint for it, or the command failed.
        WorkerError: the server failed, or is not healthy in time.
    """
    if settings.reload == "command":
        _run(settings, connection.url, folder, version)
        _wait_until_healthy(connection, settings.reload_timeout_s)
        return
    limit = settings.reload_timeout_s
    with _endpoint(connection, settings):
        if settings.reload == "vllm":
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            connection.ask("POST", "/collective_rpc", f"read the weights in {folder}", body=body, timeout_s=limit)
            connection.ask("POST", "/reset_prefix_cache", "reset its prefix cache")
        else:
            # SGLang 0.5.21 ends if it is to flush within the update and still has a request whose client just left
            disk = {"model_path": str(folder), "load_format": "safetensors", "flush_cache": False}
            connection.ask(
                "POST", "/update_weights_from_disk", f"read the weights in {folder}", body=disk, timeout_s=limit
            )
            flush = f"/flush_cache?timeout={limit:g}"  # waits until it has no request
            connection.ask("POST", flush, "reset its prefix cache", timeout_s=limit + POLL_S, plain=True)


@contextmanager
def _endpoint(connection: Connection, settings: HTTPSettings) -> Iterator[None]:
    """Say how to start the server where it has no endpoint for a reload."""
    try:
        yield
    except EngineError as error:
        if "(404" not in str(error):
            raise
        remedy = {"vllm": "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment", "sglang": "is it SGLang?"}
        raise EngineError(
            f"{connection.url} has no endpoint for rollout.http.reload={settings.reload}; {remedy[settings.reload]}"
        ) from error


def _run(settings: HTTPSettings, url: str, folder: Path, version: int) -> None:
    """Run the user's command; its output goes to a file, because a server that it starts may keep it open."""
    words = [word.format(folder=folder, url=url, version=version) for word in settings.command]
    assert settings.weights_dir is not None
    log = settings.weights_dir / f"{_name(url)}.log"
    try:
        with log.open("wb") as output:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=settings.reload_timeout_s,
                check=False,
            )
    except OSError as error:
        raise EngineError(f"reload_command cannot be started: {error}") from error
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"reload_command did not end within {settings.reload_timeout_s:g} s (reload_timeout_s)"
        ) from None
    if done.returncode:
        end = " ".join(log.read_text(errors="replace").split())[-MAX_OUTPUT:]
        raise EngineError(f"reload_command ended with status {done.returncode}: {end or 'no output'} ({log})")


def _wait_until_healthy(connection: Connection, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.ask(
                "GET", "/health", "report its health", timeout_s=min(timeout_s, connection.timeout_s), plain=True
            )
            return
        except WorkerError as error:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{connection.url} is not healthy {timeout_s:g} s after reload_command (reload_timeout_s): {error}"
                ) from error
            time.sleep(POLL_S)
