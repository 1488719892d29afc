"""Supervised fine-tuning: the likelihood of given answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from pydantic import Field

from rlcore.algorithms.objectives import SFTObjective, SFTObjectiveSettings
from rlcore.batch import Batch
from rlcore.cli import run_recipe_module
from rlcore.config import Config
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngine
from rlcore_recipes.data.end_tokens import missing_ends, model_tokens, save_tokenizer
from rlcore_recipes.data.loader import BatchLoader
from rlcore_recipes.data.settings import SFTDataSettings
from rlcore_recipes.data.sft import SFTDataset, load_sft
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.run.banner import model_rows
from rlcore_recipes.run.loop import Run, train
from rlcore_recipes.run.micro_batches import MicroBatches, Model
from rlcore_recipes.run.preflight import check_sources
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.roles import closed, open_executor, train_engine, with_total_steps
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.settings import ControllerSettings, ModelRole, TrainerSettings
from rlcore_recipes.settings.controller import unused
from rlcore_recipes.step.validation import Validation


class SFTActorSettings(ModelRole):
    """The model under training. One step is one optimizer step over one batch."""

    optim: OptimSettings = Field(default_factory=lambda: OptimSettings(lr=1e-5), description="Optimizer and schedule.")
    objective: SFTObjectiveSettings = Field(default_factory=SFTObjectiveSettings, description="Loss.")


class SFTConfig(Config):
    """One run of supervised fine-tuning."""

    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the data order.")
    model: ModelSettings = Field(description="The model to train.")
    data: SFTDataSettings = Field(description="What to learn; train_batch_size counts samples.")
    actor: SFTActorSettings = Field(default_factory=SFTActorSettings, description="The model under training.")
    trainer: TrainerSettings = Field(description="Length, validation, checkpoints, tracking.")
    controller: ControllerSettings = Field(default_factory=ControllerSettings, description="What runs the engines.")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.trainer.test_freq > 0 and not self.data.val_files:
            yield "trainer.test_freq", f"is {self.trainer.test_freq}, but data.val_files is empty"
        if self.trainer.log_val_generations:
            yield "trainer.log_val_generations", "sft validates by the loss and generates nothing; set it to 0"
        yield from unused(self.controller, self.roles)

    @property
    def roles(self) -> list[str]:
        """What takes part in the run."""
        return ["actor"]

    @property
    def arithmetic(self) -> list[tuple[str, str, str]]:
        """What `rlcore plan` prints of the sizes of a step: what, how it is counted, the number."""
        return [
            ("samples of a step", "data.train_batch_size, one optimizer step", str(self.data.train_batch_size)),
            ("steps", *self.trainer.length),
        ]


@restarting
def run(config: SFTConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    data, trainer = config.data, config.trainer
    check_sources(config, [*data.train_files, *(data.val_files if trainer.test_freq > 0 else ())])
    tokenizer = load_tokenizer(config.model)
    size, ends = model_tokens(config.model)
    dataset = load_sft(data, data.train_files, tokenizer, vocabulary=size)
    stop_tokens = missing_ends(config.model, tokenizer, dataset.ends)
    batches = BatchLoader(
        dataset.batch,
        dataset.file_sizes,
        data.train_batch_size,
        seed=config.seed,
        shuffle=data.shuffle,
        weights=data.weights,
        fingerprints=dataset.fingerprints,
    )
    held_out = load_sft(data, data.val_files, tokenizer, data.val_limit, size) if trainer.test_freq > 0 else None
    total_steps = trainer.total_steps or trainer.total_epochs * batches.steps_per_epoch
    with ExitStack() as stack:
        optim = with_total_steps(config.actor.optim, total_steps)
        executor = open_executor(config.controller, config.roles, trainer.out_dir, stack)
        factory = partial(
            train_engine, config.actor, config.model, optim=optim, seed=config.seed, max_length=config.data.max_length
        )
        actor = executor.build("actor", TrainEngine, factory)  # type: ignore[type-abstract]
        stack.callback(closed, actor)
        largest = -(-data.train_batch_size // actor.dp_size) * data.max_length
        budgets = MicroBatches(executor, {"actor": Model(actor, config.actor)}, data.max_length, largest)
        train(
            Run(
                recipe="sft",
                config=config,
                trainer=trainer,
                seed=config.seed,
                total_steps=total_steps,
                step=lambda number: step(actor, next(batches), config.actor.objective),
                validate=None if held_out is None else lambda: validate(actor, held_out, data.val_batch_size),
                engines={"actor": actor},
                parts={"samples": batches, "micro_batches": budgets},
                resumed=lambda done: None,
                save_tokenizer=partial(save_tokenizer, tokenizer, stop_tokens),
                timed=Timings(executor),
                apply=executor.apply,
                about=lambda: [
                    *model_rows(executor, actor, config.model, budgets, tokenizer, ends | dataset.ends),
                    ("data", f"{batches.samples:,} samples; {data.train_batch_size} in a step"),
                ],
            )
        )


def step(actor: TrainEngine, batch: Batch, objective: SFTObjectiveSettings) -> dict[str, float]:
    """One optimizer step."""
    metrics = actor.train(batch.select("tokens", "loss_mask"), SFTObjective(objective)).prefixed("train/").to_dict()
    return metrics | {
        "train/learned_tokens": float(batch.flat("loss_mask").sum()),
        "perf/total_num_tokens": float(batch.total_tokens),
    }


def validate(actor: TrainEngine, held_out: SFTDataset, batch_size: int | None) -> Validation:
    """Mean negative log-likelihood per learned token, over all held-out samples."""
    total = learned = 0.0
    for batch in held_out.batch.select("tokens", "loss_mask").split(batch_size or len(held_out)):
        total -= float(actor.forward(batch, ForwardRequest(("logprobs",))).flat("logprobs").double().sum())
        learned += float(batch.flat("loss_mask").sum())
    loss = total / max(learned, 1.0)
    return Validation({"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))})


if __name__ == "__main__":
    run_recipe_module("sft")
