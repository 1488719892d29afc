"""The session of supervised fine-tuning: everything that its steps use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlcore.controller import Executor
from rlcore.engines import TrainEngine
from rlcore_recipes.data.end_tokens import missing_ends, model_tokens, save_tokenizer
from rlcore_recipes.data.loader import BatchLoader
from rlcore_recipes.data.sft import SFTDataset, load_sft
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.run.banner import model_rows
from rlcore_recipes.run.micro_batches import MicroBatches, Model
from rlcore_recipes.run.preflight import check_sources
from rlcore_recipes.run.records import Records
from rlcore_recipes.run.roles import closed, open_executor, train_engine, with_total_steps
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.run.trainable import Stateful
from rlcore_recipes.settings.supervised import SFTConfig


@dataclass
class SFTSession:
    """The parts of one run of supervised fine-tuning; see `rlcore_recipes.run.trainable.Trainable`.

    Attributes:
        batches: endless batches of samples to learn.
        held_out: samples to validate on; None if nothing is validated.
        end_tokens: tokens that end an answer.
        stop_tokens: those of them that the model does not know as end tokens.
        notes: what was recognised in the data, and how many samples were too long.
    """

    config: SFTConfig
    executor: Executor
    actor: TrainEngine
    micro_batches: MicroBatches
    tokenizer: Any
    batches: BatchLoader
    held_out: SFTDataset | None
    total_steps: int
    timed: Timings
    end_tokens: frozenset[int]
    stop_tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()
    max_error_ratio: float = 1.0  # no rewards
    records: Records = field(default_factory=Records)

    @property
    def engines(self) -> dict[str, TrainEngine]:
        """The engine whose state is in every checkpoint."""
        return {"actor": self.actor}

    @property
    def parts(self) -> dict[str, Stateful]:
        """Further state of a checkpoint: the position in the data, and token budgets."""
        return {"samples": self.batches, "micro_batches": self.micro_batches}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, with all tokens that end an answer, into ``folder``."""
        save_tokenizer(self.tokenizer, self.stop_tokens, folder)

    def about(self) -> list[tuple[str, str]]:
        """Return what the run consists of, for its start banner."""
        config, budgets = self.config, self.micro_batches
        models = model_rows(self.executor, self.actor, config.model, budgets, self.tokenizer, self.end_tokens)
        samples = f"{self.batches.samples:,} samples; {config.data.train_batch_size} in a step"
        return [*models, ("data", samples), *(("", note) for note in self.notes)]


@contextmanager
def open_sft(config: SFTConfig) -> Iterator[SFTSession]:
    """Read the data, then build the model; close it at the end.

    Raises:
        RlcoreError: something in the input is missing, broken or in the way. Nothing has been written then.
    """
    data, trainer = config.data, config.trainer
    validates = trainer.test_freq > 0
    check_sources(config, [*data.train_files, *(data.val_files if validates else ())])
    tokenizer = load_tokenizer(config.model)
    size, model_ends = model_tokens(config.model)
    dataset = load_sft(data, data.train_files, tokenizer, vocabulary=size)
    held_out = load_sft(data, data.val_files, tokenizer, data.val_limit, size) if validates else None
    batches = _batches(config, dataset)
    total_steps = trainer.total_steps or trainer.total_epochs * batches.steps_per_epoch
    limit = f"longer than data.max_length={data.max_length}"
    overlong = [f"{dataset.filtered:,} samples are {limit} and left out"] if dataset.filtered else []
    with ExitStack() as stack:
        executor = open_executor(config.controller, config.roles, trainer.out_dir, stack)
        optim = with_total_steps(config.actor.optim, total_steps)
        factory = partial(
            train_engine, config.actor, config.model, optim=optim, seed=config.seed, max_length=data.max_length
        )
        actor = executor.build("actor", TrainEngine, factory)  # type: ignore[type-abstract]
        stack.callback(closed, actor)
        largest = -(-data.train_batch_size // actor.dp_size) * data.max_length
        yield SFTSession(
            config=config,
            executor=executor,
            actor=actor,
            micro_batches=MicroBatches(executor, {"actor": Model(actor, config.actor)}, data.max_length, largest),
            tokenizer=tokenizer,
            batches=batches,
            held_out=held_out,
            total_steps=total_steps,
            timed=Timings(executor),
            end_tokens=model_ends | dataset.ends,
            stop_tokens=missing_ends(config.model, tokenizer, dataset.ends),
            notes=(*dataset.notes, *overlong),
        )


def _batches(config: SFTConfig, dataset: SFTDataset) -> BatchLoader:
    return BatchLoader(
        dataset,
        dataset.file_sizes,
        config.data.train_batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        weights=config.data.weights,
        fingerprints=dataset.fingerprints,
    )
