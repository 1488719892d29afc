"""What is looked at before anything is loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from pydantic import Field

from rlcore.config import Config
from rlcore.engines import ModelSettings
from rlcore.errors import DataError, RlcoreWarning
from rlcore_recipes.data.files import read_rows
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.run.preflight import check_sources, model_sources


class Role(Config):
    model: ModelSettings | None = Field(None, description="A model.")


class RunConfig(Config):
    model: ModelSettings = Field(description="A model.")
    critic: Role = Field(default_factory=Role, description="A role.")


class _Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A Hub that answers, for a process that is online."""
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_without_network_only_the_cache_is_read(hub: HTTPServer, tmp_path: Path) -> None:
    config = RunConfig(model=ModelSettings(path="org/name-that-is-nowhere"))
    check_sources(config, [])  # it answers, if only "404"
    assert not constants.HF_HUB_OFFLINE
    hub.shutdown()
    hub.server_close()
    check_sources(RunConfig(model=ModelSettings(path=str(tmp_path))), [])  # nothing to look for there
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(DataError, match=r"data file .*rows\.jsonl does not exist"):
        check_sources(config, ["hub:org/data", f"{tmp_path}/rows.jsonl"])
    assert not constants.HF_HUB_OFFLINE  # files are looked for first
    with pytest.warns(RlcoreWarning, match=r"cannot be reached .*; org/name-that-is-nowhere, hub:org/data can only"):
        check_sources(config, ["hub:org/data"])
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(DataError, match=r"model\.path=org/name-that-is-nowhere is no folder here and cannot be loaded"):
        load_tokenizer(config.model)


def test_data_sets_of_the_hub_need_it_too(hub: HTTPServer) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.warns(RlcoreWarning, match="cannot be reached .*; org/data can only"), pytest.raises(DataError):
        read_rows("hub:org/data")
    assert constants.HF_HUB_OFFLINE


def test_folders_of_all_models_are_looked_for(tmp_path: Path) -> None:
    model = ModelSettings(path=str(tmp_path), tokenizer_path="org/tokenizer")
    config = RunConfig(model=model, critic=Role(model=ModelSettings(path=f"{tmp_path}/nowhere")))
    assert [key for key, _ in model_sources(config)] == ["model.path", "model.tokenizer_path", "critic.model.path"]
    assert [key for key, _ in model_sources(config.model)] == ["model.path", "model.tokenizer_path"]
    with pytest.raises(DataError, match=r"critic\.model\.path=.*/nowhere: there is no such folder"):
        check_sources(config, [])
    with pytest.raises(DataError, match=r"model\.path=x{200} cannot be read: OSError: .*File name too long"):
        check_sources(RunConfig(model=ModelSettings(path="x" * 5000)), [])
