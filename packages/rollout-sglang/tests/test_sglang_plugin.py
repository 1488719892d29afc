"""Plugin, settings and arguments, without a server."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.config import Config
from rlcore.engines import ModelSettings, RolloutSpec
from rlcore.errors import EngineError
from rlcore_sglang import quirks
from rlcore_sglang.adapters import Adapters
from rlcore_sglang.arguments import problems, server_arguments
from rlcore_sglang.engine import build
from rlcore_sglang.server_process import reason_in
from rlcore_sglang.settings import SGLangSettings


def spec(**options) -> RolloutSpec:
    return RolloutSpec(ModelSettings(path="anywhere"), SGLangSettings(**options), 64, seed=7)


def test_the_plugin_is_found_with_its_settings():
    model = plugins.get("rlcore.rollout_engines", "sglang").config_class()
    assert issubclass(model, Config)
    assert model is SGLangSettings
    assert all(field.description for field in model.model_fields.values())


def test_settings_import_neither_torch_nor_sglang_nor_httpx():
    modules = "rlcore_sglang.plugin, rlcore_sglang.settings"
    code = f"import sys, {modules}; print({{'torch', 'sglang', 'httpx'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tpsize": 2}, "did you mean tp_size"),
        ({"urls": ["http://10.1.2.3:8000"]}, "http://10.1.2.3:8000 is not on this machine; set allow_remote"),
        ({"urls": ["localhost:8000"]}, "'localhost:8000' is not the URL of a server; write http://host:port"),
        ({"urls": ["http://localhost:1/", "http://localhost:1"]}, "urls names a server twice"),
        ({"urls": ["http://localhost:1"], "router": "http://example.org"}, "example.org is not on this machine"),
        ({"router": "http://localhost:1"}, "weights go directly to the servers behind the router"),
        ({"urls": ["http://localhost:1"], "replicas": 2}, "servers are started only if urls is empty"),
        ({"weights": "disk"}, "weights 'disk' needs a folder"),
        ({"enable_lora": True}, "set pause_mode to abort, which continues them with the new ones, not retract"),
        ({"enable_lora": True, "pause_mode": "abort", "weights": "distributed"}, "set weights to tensor, not distr"),
        ({"enable_lora": True, "pause_mode": "abort", "sleep_level": 2}, "sleep_level=2 drops the base weights"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        SGLangSettings(**options)


def test_the_error_without_sglang_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'rlcore\[sglang\]', or name running servers"):
        build(spec())


def test_an_old_version_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.9.post2")
    with pytest.raises(EngineError, match=r"sglang 0\.5\.9\.post2 is too old: .* needs 0\.5\.21 or newer"):
        quirks.require_sglang()


def test_arguments_follow_the_settings_and_the_device():
    wanted = spec(tp_size=2, mem_fraction_static=0.5, args={"chunked_prefill_size": 512, "log_level": "debug"})
    made = server_arguments(wanted, wanted.options, on_cpu=False)
    assert made["dtype"] == "bfloat16"
    assert made["sampling_backend"] == "rlcore"
    assert made["enable_memory_saver"]
    assert made["enable_weights_cpu_backup"]
    assert {made["tp_size"], made["mem_fraction_static"], made["chunked_prefill_size"]} == {2, 0.5, 512}
    assert (made["random_seed"], made["context_length"], made["log_level"]) == (7, 64, "debug")
    assert "attention_backend" not in made
    on_cpu = server_arguments(wanted, wanted.options, on_cpu=True)
    assert (on_cpu["dtype"], on_cpu["enable_memory_saver"]) == ("float32", False)
    deep = spec(sleep_level=2)
    assert not server_arguments(deep, deep.options, on_cpu=False)["enable_weights_cpu_backup"]


def test_unknown_and_reserved_arguments_are_explained():
    known = ["chunked_prefill_size", "quantization", "tp_size", "port"]
    found = problems({"chunked_prefil_size": 1, "zzz": 1, "port": 1, "tp_size": 2, "quantization": "fp8"}, known)
    assert found == [
        "the installed SGLang has no argument chunked_prefil_size; did you mean chunked_prefill_size?",
        "the installed SGLang has no argument zzz; see `sglang serve --help` for its arguments",
        "port cannot be set: rlcore chooses a free one",
        "tp_size is a setting: set rollout.sglang.tp_size instead of args.tp_size",
    ]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "it printed nothing"),
        ("starting\nKilled\n", "Killed"),
        (
            'Traceback\n  File "x"\nImportError: libcuda.so.1: cannot open\nTraceback\nRuntimeError: later\n',
            "ImportError: libcuda.so.1: cannot open; this build of SGLang needs a GPU and its driver",
        ),
        (
            "[2026-01-01 TP0] RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.\nbye\n",
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.; raise mem_fraction_static",
        ),
        ("RuntimeError: x\nrlcore refuses: rollout.sglang.args: no\n", "rlcore refuses: rollout.sglang.args: no"),
    ],
)
def test_the_reason_is_found_in_a_log(log, reason):
    assert reason_in(log).startswith(reason)


def test_only_the_policys_adapters_are_unloaded():
    """The name of a server that the engine started begins with rlcore- too."""
    posted = []

    class Served:
        def ask(self, method, path, what, **options):
            if method == "GET":
                return {"data": [{"id": f"{name}-0a1b"} for name in ("rlcore", "rlcore-policy", "theirs")]}
            posted.append((path, options["body"]))
            return None

    Adapters(Served(), workers=1, shapes={}, timeout_s=1).continue_with(None)
    assert posted == [("/unload_lora_adapter", {"lora_name": "rlcore-policy-0a1b"})]
