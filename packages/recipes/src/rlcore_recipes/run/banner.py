"""Messages before the first step of a run and after its last one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rlcore.controller import Executor
from rlcore.engines import ModelSettings, TrainEngine
from rlcore_recipes.ranks import is_main
from rlcore_recipes.run.folder import MODEL
from rlcore_recipes.run.micro_batches import MicroBatches
from rlcore_recipes.settings import TrainerSettings
from rlcore_recipes.trackers.jsonl import METRICS

Row = tuple[str, str]


def model_rows(
    executor: Executor,
    actor: TrainEngine,
    model: ModelSettings,
    budgets: MicroBatches,
    tokenizer: Any,
    ends: Iterable[int],
) -> list[Row]:
    """Return the model under training, where it is, its end tokens, and the token budgets of micro-batches."""
    memory = budgets.memory["actor"]
    parameters = None if memory is None else memory.parameters
    size = "" if parameters is None else f", {parameters:,} parameters"
    names = ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)!r}" for token in sorted(ends))
    return [
        ("model", f"{model.path}{size}"),
        ("device", devices(executor.apply(actor, device_of))),
        ("end tokens", names or "none: completions end at their longest length"),
        ("micro-batches", "; ".join(budgets.lines())),
    ]


def device_of(engine: TrainEngine) -> str:
    """Return the name of the device of ``engine``."""
    device = engine.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def devices(names: Sequence[str]) -> str:
    """Return the devices of all ranks, such as "8 × NVIDIA H200"."""
    return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in sorted(Counter(names).items()))


def print_start(recipe: str, rows: Sequence[Row], trainer: TrainerSettings, done: int, total: int) -> None:
    """Say what the run consists of; ``done`` of its ``total`` steps are behind it."""
    if not is_main():
        return
    rows = [*rows, ("steps", f"{total}" + (f", {done} of them done" if done else "")), ("writes", _written(trainer))]
    width = max(len(name) for name, _ in rows)
    lines = [f"{recipe}", *(f"  {name:{width}}  {value}" for name, value in rows)]
    print("\n".join(lines), file=sys.stderr, flush=True)


def print_end(trainer: TrainerSettings, total: int) -> None:
    """Say where things are, and how to get at the model if it was not exported."""
    if not is_main():
        return
    if trainer.save_hf:
        model = f"the model is in {trainer.out_dir / MODEL}"
    elif trainer.save_freq > 0:
        model = (
            "no model was exported; run the same command with trainer.save_hf=true to write "
            f"{trainer.out_dir / MODEL} from the last checkpoint"
        )
    else:
        model = "neither a model nor a checkpoint was saved (trainer.save_hf=false, trainer.save_freq=-1)"
    places = f"metrics are in {trainer.out_dir / METRICS}"
    if trainer.save_freq > 0:
        places += f", checkpoints in {trainer.checkpoint_root}"
    print(f"finished after step {total}: {places}; {model}", file=sys.stderr, flush=True)


def _written(trainer: TrainerSettings) -> str:
    parts = [f"metrics in {trainer.out_dir}"]
    if trainer.save_freq > 0:
        every = "every step" if trainer.save_freq == 1 else f"every {trainer.save_freq} steps"
        parts.append(f"checkpoints {every} in {trainer.checkpoint_root}")
    if trainer.save_hf:
        parts.append(f"the model in {trainer.out_dir / MODEL} at the end")
    if len(parts) == 1:
        parts.append("no checkpoint and no model (trainer.save_freq=-1, trainer.save_hf=false)")
    return ", ".join(parts)
