"""The plugin group of executors, and configuration keys that name a plugin."""

from typing import Annotated

import pytest

from rlcore import plugins
from rlcore.config import Config, PluginName, validate_config
from rlcore.config.keys import sections
from rlcore.config.schema import file_schema
from rlcore.controller.backend import EXECUTORS, ExecutorSpec, resources_text
from rlcore.controller.local import process_executor
from rlcore.errors import ConfigError


class Controller(Config):
    kind: Annotated[str, PluginName(EXECUTORS)] = "local"


def test_the_local_backend_starts_the_executor_of_the_process():
    backend = plugins.get(EXECUTORS, "local").build(ExecutorSpec())
    assert backend.start() is process_executor()
    assert backend.plan() is None


def test_an_unknown_executor_suggests_a_close_one():
    with pytest.raises(ConfigError, match="kind: unknown executor 'lokal'; did you mean 'local'"):
        validate_config(Controller, {"kind": "lokal"})


def test_an_executor_that_is_not_installed_says_what_to_install(monkeypatch):
    installed = plugins._points
    monkeypatch.setattr(plugins, "_points", lambda group: {k: v for k, v in installed(group).items() if k != "ray"})
    with pytest.raises(ConfigError, match=r"executor 'ray' is not installed; run: pip install 'rlcore\[ray\]'"):
        validate_config(Controller, {"kind": "ray"})


def test_help_and_schema_list_the_installed_executors():
    (section,) = sections(Controller)
    assert "local" in section.keys[0].options
    assert "local" in section.keys[0].type.split(" | ")
    assert "local" in file_schema(Controller)["properties"]["kind"]["enum"]


def test_resources_are_written_as_numbers_of_each_kind():
    assert resources_text({"CPU": 2.0, "GPU": 0.5}) == "2 CPU, 0.5 GPU"
    assert resources_text({"CPU": 0.0}) == "nothing"
