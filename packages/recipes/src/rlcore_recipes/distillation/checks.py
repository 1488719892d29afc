"""Checks of teachers and their prompts against the data, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence

from rlcore.engines.episode import PromptSample
from rlcore.errors import DataError
from rlcore_kit.model_folder.length import check_positions, check_rope
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.end_tokens import model_tokens
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.distillation.contexts import teacher_prompts
from rlcore_recipes.distillation.teachers import check_sources_taught, own_renderer, own_translator, servers_of
from rlcore_recipes.distillation.vocabulary import check_same_tokens, shared_tokens
from rlcore_recipes.run.open import RunData
from rlcore_recipes.run.other_models import check_model, config_of
from rlcore_recipes.settings.distillation import DistillConfig, TeacherSettings

CHUNK = 1000  # samples whose prompts are rendered together


def check_teachers(config: DistillConfig, data: RunData) -> None:
    """See whether every teacher reads the student's tokens, every sample has a teacher, every prompt of a teacher can
    be made and is short enough for it, and the servers of teachers give what the run asks them for.

    Raises:
        RlcoreError: one is not so; the message names the teacher, or the sample.
    """
    found = [data.prompts.dataset] if data.val_prompts is None else [data.prompts.dataset, data.val_prompts]
    check_sources_taught(config, (sample.data_source for dataset in found for sample in dataset.samples))
    for name, teacher in config.distill.teachers.items():
        key = f"distill.teachers.{name}"
        if teacher.model is not None and not teacher.cross_tokenizer:
            size, served = model_tokens(config.model)[0], teacher.scoring is not None
            check_same_tokens(key, data.tokenizer, load_tokenizer(teacher.model), size, both=served)
            if not served:
                check_model(f"{key}.model.path", teacher.model, config.model, data.tokenizer)
        _check_top_k(config, key, teacher)
        own_translator(config, teacher)
        renderer = own_renderer(config, teacher)
        length = config.data.max_response_length
        if renderer is None:  # the student's prompts
            length += max((len(sample.prompt_tokens) for dataset in found for sample in dataset.samples), default=0)
        else:
            length += max(longest_prompt(key, teacher, renderer, dataset.samples) for dataset in found)
        servers = servers_of(config, teacher)
        if servers is not None:
            servers.connect(length).close()
        if servers is not None or renderer is None:
            continue
        model = teacher.model or config.model
        hf_config = config_of(model)
        check_rope(model, hf_config, length, f"the longest prompt of {key} with a completion")
        check_positions(model, hf_config, length)


def _check_top_k(config: DistillConfig, key: str, teacher: TeacherSettings) -> None:
    """Raise DataError if the teacher has fewer tokens than are asked for."""
    top_k, tokens = config.actor.objective.divergence.top_k or 0, shared_tokens(config.model, teacher)
    if top_k > tokens:
        raise DataError(
            f"actor.objective.divergence.top_k={top_k} is more than the {tokens} tokens that {key} and the student "
            "share: lower it, or set it to null to compare the whole vocabulary"
        )


def longest_prompt(key: str, teacher: TeacherSettings, renderer: Renderer, samples: Sequence[PromptSample]) -> int:
    """Return the length of the longest prompt of the teacher at ``key``; all samples must have one."""
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
    return longest
