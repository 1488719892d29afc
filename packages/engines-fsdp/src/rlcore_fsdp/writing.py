"""Configuration files of an exported model folder."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from rlcore_kit.model_folder.files import GENERATION, Origin
from rlcore_kit.model_folder.loading import quiet
from rlcore_kit.model_folder.writing import write_configuration


def write_others(model: PreTrainedModel, origin: Origin, folder: Path) -> None:
    """Write ``config.json``, the settings for generation and the model's own code to ``folder``.

    Values that transformers would refuse to write are those of the original model, and are written unchanged.
    """
    config = copy.deepcopy(model.config)
    with quiet():
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)  # type: ignore[arg-type]
        if origin.generation is None and model.can_generate():
            model.generation_config.to_json_file(folder / GENERATION)
        write_configuration(config, type(model).__name__.removeprefix("FSDP"), origin, folder)
