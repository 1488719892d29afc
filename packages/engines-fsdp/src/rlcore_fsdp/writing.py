"""The files of an exported model folder that belong to its weights."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from rlcore_kit.model_folder.files import CONFIG, GENERATION, Origin
from rlcore_kit.model_folder.loading import quiet


def write_configuration(model: PreTrainedModel, origin: Origin, folder: Path) -> None:
    """Write ``config.json``, the settings for generation and the model's own code to ``folder``.

    Values that transformers would refuse to write came with the model, and are written as they are.
    """
    config = copy.deepcopy(model.config)
    config.dtype = origin.dtype  # of what is written, not of the master weights
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    with quiet():
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)
        if origin.generation is not None:
            (folder / GENERATION).write_text(origin.generation, encoding="utf-8")
        elif model.can_generate():
            model.generation_config.to_json_file(folder / GENERATION)
        config.to_json_file(folder / CONFIG)
