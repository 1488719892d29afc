"""``data.*``: verl's prompts."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.from_verl.keys.entries import Key, NothingToSet, already, already_if, key, without
from rlcore_recipes.from_verl.values import as_list, whole
from rlcore_recipes.from_verl.view import VerlView

VISION = "vision models are not supported; a data set with images is refused"


def files(value: Any, verl: VerlView) -> list[str]:
    """Return one file or several as a list."""
    return [str(file) for file in as_list(value)]


def batch_size(value: Any, verl: VerlView) -> Any:
    """Return the prompts of a step, which the asynchronous trainer counts elsewhere."""
    if verl.any_below("async_training"):
        raise NothingToSet("verl's asynchronous trainer takes the batch from ppo_mini_batch_size and async_training")
    return value


def overlong_prompts(value: Any, verl: VerlView) -> str:
    """Return what to do with long prompts; filtered ones leave nothing to truncate."""
    if verl.flag("data.filter_overlong_prompts"):
        return "filter"
    return str(verl.get("data.truncation"))


def limit(value: Any, verl: VerlView) -> int:
    """Return a number of rows, of which verl's -1 is all."""
    if value is None or whole(value, "data.val_max_samples") < 0:
        raise NothingToSet("all rows are used")
    return whole(value, "data.val_max_samples")


def seed(value: Any, verl: VerlView) -> Any:
    """Return the seed of the data order."""
    if value is None:
        raise NothingToSet("the order follows from the seed")
    return value


KEYS: tuple[Key, ...] = (
    key("data.train_files", "data.train_files", files, differs="~/data/rlhf/gsm8k/train.parquet"),
    key("data.val_files", "data.val_files", files, differs="~/data/rlhf/gsm8k/test.parquet"),
    key("data.train_batch_size", "data.train_batch_size", batch_size, differs=1024, meaning="prompts in both"),
    key("data.val_batch_size", "data.val_batch_size"),
    key("data.max_prompt_length", "data.max_prompt_length", differs=512),
    key("data.max_response_length", "data.max_response_length", differs=512),
    key("data.prompt_key", "data.prompt_key", default="prompt"),
    key("data.reward_fn_key", "data.data_source_key", default="data_source"),
    key(
        "data.filter_overlong_prompts",
        "data.overlong_prompts",
        overlong_prompts,
        differs=False,
        meaning="True: filter; False: what data.truncation says",
    ),
    key("data.truncation", "data.overlong_prompts", overlong_prompts, default="error"),
    key("data.shuffle", "data.shuffle", default=True),
    key("data.seed", "seed", seed),
    key("data.val_max_samples", "data.val_limit", limit, meaning="-1: all"),
    key("data.trust_remote_code", "model.trust_remote_code", default=False),
    key("data.tokenizer", "model.tokenizer_path"),
    key("data.apply_chat_template_kwargs.*", "data.chat_template_kwargs.*"),
    already_if(
        "data.train_max_samples", (-1, None), "all rows are used", "write a file with the rows to train on", default=-1
    ),
    already("data.return_raw_chat", "rewards always get the text"),
    already("data.return_raw_input_ids", "rewards and environments always have the prompt"),
    already("data.return_full_prompt", "rewards and environments always have the prompt"),
    already("data.filter_overlong_prompts_workers", "prompts are tokenised in one pass"),
    already("data.dataloader_num_workers", "prompts are tokenised before the run and held in memory"),
    already_if(
        "data.validation_shuffle",
        (False,),
        "validation goes in the order of the files",
        "validation always goes in the order of the files; its metrics do not depend on the order",
    ),
    without(
        "data.gen_batch_size",
        "rlcore starts another prompt for each dropped group, instead of generating whole batches of prompts",
    ),
    without("data.image_key", VISION, off=("images",)),
    without("data.video_key", VISION, off=("videos",)),
    without("data.audio_key", VISION, off=("audios",)),
    without("data.image_patch_size", VISION, off=(14,)),
    already("data.return_multi_modal_inputs", VISION),
    without("data.mm_processor_kwargs.*", VISION, old=("data.mm_processor_kwargs",)),
    without("data.use_shm", "data files are read where they are", off=(False,)),
    without(
        "data.custom_cls.*",
        "a data set is a file, or the result of a function: write one for `rlcore data module.py:function`",
        old=("data.custom_cls",),
    ),
    without(
        "data.sampler.*",
        "the order is shuffled or that of the files; data.weights mixes files",
        switch="data.sampler.class_path",
    ),
    without("data.datagen.*", "training data are not generated during the run"),
    without("data.tool_config_path", "tools belong to an environment: see rlcore-agents"),
    without("data.function_tool_path", "tools belong to an environment: see rlcore-agents"),
)
