"""Every configuration that is shipped is valid."""

from pathlib import Path

import pytest

from rlcore import plugins
from rlcore.config import dump_config, load_config

RECIPES = plugins.names("rlcore.recipes")
SHIPPED = [(recipe, name) for recipe in RECIPES for name in plugins.get("rlcore.recipes", recipe).ready_made()]


@pytest.mark.parametrize(("recipe", "name"), SHIPPED)
def test_shipped_configuration_is_valid(recipe: str, name: str, tmp_path: Path) -> None:
    plugin = plugins.get("rlcore.recipes", recipe)
    config = load_config(plugin.config_class(), plugin.ready_made()[name])
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(config))
    assert load_config(plugin.config_class(), written) == config
    assert str(config.trainer.out_dir) == f"runs/{name}"
    assert not list(config.doubts())


def test_the_common_cases_are_there() -> None:
    names = {name for _, name in SHIPPED}
    assert names >= {
        "sft_gsm8k",
        "rm_ultrafeedback",
        "grpo_gsm8k",
        "ppo_gsm8k",
        "dapo_math",
        "dr_grpo_math",
        "rloo_gsm8k",
    }
    assert {recipe for recipe, _ in SHIPPED} == set(RECIPES)
