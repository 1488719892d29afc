"""Checks of teachers and their prompts against the data, before anything is built."""

from __future__ import annotations

from rlcore_kit.model_folder.length import check_positions, check_rope
from rlcore_recipes.distillation.contexts import teacher_prompts
from rlcore_recipes.distillation.teachers import check_sources_taught, own_renderer
from rlcore_recipes.run.open import RunData
from rlcore_recipes.run.other_models import check_model, config_of
from rlcore_recipes.settings.distillation import DistillConfig

CHUNK = 1000  # samples whose prompts are rendered together


def check_teachers(config: DistillConfig, data: RunData) -> None:
    """See whether every teacher reads the student's tokens, every sample has a teacher, and every prompt of a teacher
    can be made and is short enough for it.

    Raises:
        RlcoreError: one is not so; the message names the teacher, or the sample.
    """
    samples = data.prompts.dataset.samples
    check_sources_taught(config, (sample.data_source for sample in samples))
    for name, teacher in config.distill.teachers.items():
        key = f"distill.teachers.{name}"
        if teacher.model is not None:
            check_model(f"{key}.model.path", teacher.model, config.model, data.tokenizer)
        renderer = own_renderer(config, teacher)
        if renderer is None:
            continue
        longest = 0
        for start in range(0, len(samples), CHUNK):
            chunk = samples[start : start + CHUNK]
            rows = [
                {
                    "messages": sample.messages,
                    "prompt_text": sample.text,
                    "ground_truth": sample.ground_truth,
                    "data_source": sample.data_source,
                    "extra": sample.extra,
                }
                for sample in chunk
            ]
            places = [f"{key}, prompt {sample.index} of the data" for sample in chunk]
            longest = max(longest, *map(len, teacher_prompts(rows, teacher, renderer, places)))
        model = teacher.model or config.model
        hf_config, longest = config_of(model), longest + config.data.max_response_length
        check_rope(model, hf_config, longest, f"the longest prompt of {key} with a completion")
        check_positions(model, hf_config, longest)
