import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.config import Config
from rlcore.errors import PluginError


def test_is_found_and_has_no_options():
    model = plugins.get("rlcore.rollout_engines", "vllm").config_class()
    assert issubclass(model, Config)
    assert model().model_dump() == {}
    with pytest.raises(ValidationError, match="unknown key"):
        model(anything=1)


def test_building_it_says_what_to_use_instead():
    with pytest.raises(PluginError, match=r"vLLM engine is not implemented in this version.*engine=inline"):
        plugins.get("rlcore.rollout_engines", "vllm").build(None)
