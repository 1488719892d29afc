"""Plugin and settings, without an engine."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.config import Config
from rlcore.engines import ModelSettings, RolloutSpec
from rlcore.errors import EngineError
from rlcore_vllm import quirks
from rlcore_vllm.engine import build
from rlcore_vllm.settings import VLLMSettings


def test_the_plugin_is_found_with_its_settings():
    model = plugins.get("rlcore.rollout_engines", "vllm").config_class()
    assert issubclass(model, Config)
    assert model is VLLMSettings
    assert all(field.description for field in model.model_fields.values())


def test_settings_import_neither_torch_nor_vllm():
    code = "import sys, rlcore_vllm.plugin, rlcore_vllm.settings; print({'torch', 'vllm'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_unknown_options_have_hints():
    with pytest.raises(ValidationError, match="did you mean tensor_parallel_size"):
        VLLMSettings(tensor_paralel_size=2)


def test_the_server_section_needs_mode_server():
    with pytest.raises(ValidationError, match="mode 'server' needs the section server"):
        VLLMSettings(mode="server")
    with pytest.raises(ValidationError, match="only mode 'server' uses servers"):
        VLLMSettings(server={"urls": ["http://127.0.0.1:1"]})


def test_contradicting_settings_are_refused():
    with pytest.raises(ValidationError, match="several engines need separate processes"):
        VLLMSettings(replicas=2)
    with pytest.raises(ValidationError, match="delta needs weights 'transfer' by shm or gloo"):
        VLLMSettings(mode="server", server={"urls": ["http://127.0.0.1:1"], "transport": "nccl", "delta": True})


def test_the_error_without_vllm_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'rlcore\[vllm\]'"):
        build(RolloutSpec(ModelSettings(path="anywhere"), VLLMSettings(), 64))


def test_an_untested_version_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.99.0")
    assert quirks.require_vllm() == "0.99.0"
    assert "vllm 0.99.0 is newer than 0.33" in caplog.text


def test_an_old_version_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.31.2")
    with pytest.raises(EngineError, match=r"vllm 0\.31\.2 is too old: rlcore-rollout-vllm needs 0\.32 or newer"):
        quirks.require_vllm()
