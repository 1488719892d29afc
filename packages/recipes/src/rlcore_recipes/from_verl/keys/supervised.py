"""Keys of verl's SFT trainer: ``data.*``, ``model.*``, ``optim.*``, ``engine.*``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rlcore_recipes.from_verl.keys.data import files, limit
from rlcore_recipes.from_verl.keys.engines import ULYSSES, fsdp_keys, megatron_keys, only, replicas
from rlcore_recipes.from_verl.keys.entries import (
    Key,
    NoEquivalent,
    NothingToSet,
    Several,
    already,
    already_if,
    key,
    without,
)
from rlcore_recipes.from_verl.keys.model import model_keys
from rlcore_recipes.from_verl.keys.optim import optim_keys
from rlcore_recipes.from_verl.values import as_list, flag, whole
from rlcore_recipes.from_verl.view import VerlView

VARIABLES = "variables of the template are those of the run: data.chat_template_kwargs"
BUDGET = "a token budget; losses and gradients do not depend on it"


def conversations(verl: VerlView) -> bool:
    """Return whether rows are whole conversations: verl's engine trainer knows nothing else."""
    if verl.given("data.prompt_key") or verl.given("data.response_key"):
        return False
    return verl.flag("data.multiturn.enable") or not verl.entry.endswith("fsdp_sft_trainer")


def messages(value: Any, verl: VerlView) -> Any:
    """Return the column of conversations."""
    if not conversations(verl):
        raise NothingToSet("verl reads it with data.multiturn.enable=True only")
    return value


def column(name: str) -> Any:
    """Return the conversion of a column and the field in it: ``extra_info`` and ``['question']``."""

    def convert(value: Any, verl: VerlView) -> str:
        if conversations(verl):
            raise NothingToSet("rows are whole conversations")
        fields = as_list(verl.get(f"data.{name}_dict_keys")) if verl.given(f"data.{name}_dict_keys") else []
        return ".".join(map(str, [verl.get(f"data.{name}_key"), *fields]))

    return convert


def overlong(value: Any, verl: VerlView) -> str:
    """Return what to do with long samples."""
    if value == "left":
        raise NoEquivalent("a long sample is left out, cut at its end, or an error: data.overlong")
    return {"error": "error", "right": "truncate"}.get(str(value), "error")


def budget(value: Any, verl: VerlView) -> int:
    """Return the token budget of a micro-batch."""
    if verl.flag("data.use_dynamic_bsz"):
        return verl.whole("data.max_token_len_per_gpu")
    per_gpu = verl.get("data.micro_batch_size_per_gpu")
    return max(whole(per_gpu, "data.micro_batch_size_per_gpu"), 1) * verl.longest_sequence


def sequences(value: Any, verl: VerlView) -> int:
    """Return the token budget, where sequences are counted."""
    if verl.flag("data.use_dynamic_bsz"):
        raise NothingToSet("verl does not read it with use_dynamic_bsz=True")
    return budget(value, verl)


def tokens(value: Any, verl: VerlView) -> int:
    """Return the token budget, where tokens are counted."""
    if not verl.flag("data.use_dynamic_bsz"):
        raise NothingToSet("verl does not read it with use_dynamic_bsz=False")
    return budget(value, verl)


def strategy(value: Any, verl: VerlView) -> str:
    """Return the training engine."""
    if value not in ("fsdp", "fsdp2", "megatron"):
        raise NoEquivalent("the training engines are fsdp and megatron; this run uses fsdp")
    return verl.engine


def by_strategy(fsdp: Iterable[Key], megatron: Iterable[Key]) -> tuple[Key, ...]:
    """Return the keys of a section that holds the settings of either engine; a name may be a key of both."""
    found = {entry.name: entry for entry in fsdp}
    for entry in megatron:
        found[entry.name] = _either(found[entry.name], entry) if entry.name in found else entry
    return tuple(found.values())


def _either(fsdp: Key, megatron: Key) -> Key:
    """Return one key of both engines; what it sets depends on the engine of the run."""

    def convert(value: Any, verl: VerlView) -> Any:
        entry = megatron if verl.engine == "megatron" else fsdp
        converted = entry.convert(value, verl)
        return converted if isinstance(converted, Several) else Several({entry.ours[0]: converted})

    return replace(fsdp, ours=tuple(dict.fromkeys((*fsdp.ours, *megatron.ours))), convert=convert)


_BUDGET = "actor.max_tokens_per_micro_batch"
_MODEL = tuple(
    entry for entry in model_keys("model", "model", "actor") if entry.name != "model.enable_gradient_checkpointing"
)

_OF_FSDP = tuple(
    entry
    for entry in fsdp_keys("engine", "actor")
    if entry.name.removeprefix("engine.") not in ("fsdp_size", "ulysses_sequence_parallel_size", "strategy", "seed")
)

FSDP_TRAINER = {
    "optim.lr": 1e-5,
    "optim.betas": [0.9, 0.95],
    "optim.lr_scheduler_type": "cosine",
    "optim.lr_warmup_steps_ratio": 0.1,
}
"""Defaults of verl's former SFT trainer, ``fsdp_sft_trainer``."""

ENGINE_TRAINER = {
    "optim.lr": 1e-3,
    "data.val_files": None,
    "data.use_dynamic_bsz": True,
    "model.enable_gradient_checkpointing": True,
    "trainer.n_gpus_per_node": 1,
}
"""Defaults of verl's later SFT trainers, ``sft_trainer`` and ``sft_trainer_ray``."""

KEYS: tuple[Key, ...] = (
    key("data.train_files", "data.train_files", files, differs="~/data/gsm8k/train.parquet"),
    key("data.val_files", "data.val_files", files, differs="~/data/gsm8k/test.parquet"),
    key("data.train_batch_size", "data.train_batch_size", differs=256, meaning="samples in both"),
    key(
        "data.micro_batch_size_per_gpu",
        _BUDGET,
        sequences,
        default=4,
        old=("data.micro_batch_size",),
        meaning=f"times data.max_length: {BUDGET}",
    ),
    key("data.use_dynamic_bsz", _BUDGET, budget, default=False, meaning="whether sequences or tokens are counted"),
    key("data.max_token_len_per_gpu", _BUDGET, tokens, default=8192, meaning=BUDGET),
    key("data.max_length", "data.max_length", differs=1024),
    key("data.truncation", "data.overlong", overlong, differs="error", meaning="right: truncate"),
    key("data.prompt_key", "data.prompt_key", column("prompt"), differs="question"),
    key("data.prompt_dict_keys", "data.prompt_key", column("prompt"), meaning="a field of a column: column.field"),
    key("data.response_key", "data.response_key", column("response"), differs="answer"),
    key(
        "data.response_dict_keys", "data.response_key", column("response"), meaning="a field of a column: column.field"
    ),
    key("data.messages_key", "data.messages_key", messages, differs="messages", old=("data.multiturn.messages_key",)),
    key(
        "data.multiturn.enable",
        "data.messages_key",
        lambda value, verl: messages(verl.get("data.messages_key"), verl),
        default=False,
        meaning="True: data.messages_key",
    ),
    key("data.val_max_samples", "data.val_limit", limit, meaning="-1: all"),
    key("data.apply_chat_template_kwargs.*", "data.chat_template_kwargs.*"),
    already_if("data.train_max_samples", (-1, None), "all rows are used", "write a file with the rows to train on"),
    already("data.pad_mode", "sequences are always packed without padding"),
    already("data.balance_dp_token", "sequences are always divided over GPUs by their tokens"),
    already("data.num_workers", "samples are tokenised before the run and held in memory"),
    already("data.ignore_input_ids_mismatch", "a template that rewrites earlier turns is an error"),
    without("data.custom_cls.*", "a data set is a file: write one with `rlcore data module.py:function`"),
    without("data.tools_key", "a row has messages only", off=("tools",)),
    without("data.multiturn.*", "a row has messages only", switch="data.multiturn.enable"),
    without("data.enable_thinking_key", VARIABLES, off=("enable_thinking",)),
    without("data.enable_thinking_default", VARIABLES, off=("none",)),
    without("data.chat_template", "the template is the tokenizer's: put it into the tokenizer's folder"),
    without("data.use_shm", "data files are read where they are", off=(False,)),
    *_MODEL,
    key("model.partial_pretrain", "model.path"),
    key(
        "model.enable_gradient_checkpointing",
        "actor.fsdp.gradient_checkpointing",
        lambda value, verl: flag(value),
        default=False,
    ),
    key("model.strategy", "actor.engine", strategy, default="fsdp"),
    *fsdp_keys("model.fsdp_config", "actor"),
    *optim_keys("optim", "actor", 1e-5, warmup_ratio=0.0),
    key("engine.strategy", "actor.engine", strategy, default="fsdp", old=("engine.data_parallel_mode",)),
    key(
        "engine.fsdp_size",
        "actor.fsdp.replicate",
        only("fsdp", replicas),
        default=-1,
        old=("engine.data_parallel_size",),
    ),
    already_if(
        "engine.ulysses_sequence_parallel_size",
        (1, None),
        "sequences stay on one GPU",
        ULYSSES,
        old=("engine.ulysses_parallel_size", "ulysses_sequence_parallel_size"),
    ),
    *by_strategy(_OF_FSDP, megatron_keys("engine", "actor")),
    already_if(
        "engine",
        ("fsdp", "megatron"),
        "the training engine is actor.engine",
        "the training engines are fsdp and megatron; this run uses fsdp",
    ),
    already("optim", "the optimizer is that of the engine"),
    already("use_remove_padding", "sequences are always packed without padding"),
    key("trainer.seed", "seed"),
)
