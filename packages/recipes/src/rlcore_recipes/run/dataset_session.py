"""The session of training on a data set (SFT, reward models, preferences): everything that its steps use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rlcore.batch import Batch, Jagged
from rlcore.controller import Executor
from rlcore.engines import TrainEngine
from rlcore_recipes.data.end_tokens import missing_ends, model_tokens, save_tokenizer
from rlcore_recipes.data.loader import BatchLoader
from rlcore_recipes.data.mixture import by_source
from rlcore_recipes.data.sample_data import SampleDataset
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.run.banner import model_rows
from rlcore_recipes.run.loop import train
from rlcore_recipes.run.micro_batches import MicroBatches, Model
from rlcore_recipes.run.preflight import check_sources
from rlcore_recipes.run.records import Records
from rlcore_recipes.run.roles import closed, open_executor, train_engine, with_total_steps
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.run.trainable import Run, Stateful, Validation
from rlcore_recipes.settings.supervised import SampleTaskConfig

C = TypeVar("C", bound=SampleTaskConfig)
Step = Callable[["DatasetSession[C]", int], dict[str, float]]
Validate = Callable[["DatasetSession[C]"], Validation]


class LoadSamples(Protocol):
    """Reads and tokenises the samples of a task, as `rlcore_recipes.data.sft.load_sft` does."""

    def __call__(
        self, settings: Any, files: Sequence[str], tokenizer: Any, limit: int | None, vocabulary: int | None, /
    ) -> SampleDataset[Any]: ...


@dataclass
class DatasetSession(Generic[C]):
    """The parts of one run on a data set; see `rlcore_recipes.run.trainable.Trainable`.

    Attributes:
        ref: the frozen reference model; None unless the task needs one, and if it is the actor without its adapters.
        batches: endless batches of samples to learn.
        held_out: samples to validate on; None if nothing is validated.
        end_tokens: tokens that end an answer.
        stop_tokens: those of them that the model does not know as end tokens.
        notes: what was recognised in the data, and how many samples were too long.
        max_error_ratio: share of samples whose reward may fail over some steps.
        max_invalid_ratio: without effect: there are no episodes.
        more: what the task built besides the models.
        stack: closes it.
    """

    config: C
    executor: Executor
    actor: TrainEngine
    ref: TrainEngine | None
    micro_batches: MicroBatches
    tokenizer: Any
    batches: BatchLoader
    held_out: SampleDataset[Any] | None
    total_steps: int
    timed: Timings
    end_tokens: frozenset[int]
    stop_tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()
    max_error_ratio: float = 1.0
    max_invalid_ratio: float = 1.0
    more: Any = None
    stack: ExitStack = field(default_factory=ExitStack)
    records: Records = field(default_factory=Records)

    @property
    def engines(self) -> dict[str, TrainEngine]:
        """The engine whose state is in every checkpoint."""
        return {"actor": self.actor}

    @property
    def parts(self) -> dict[str, Stateful]:
        """Further state of a checkpoint: the position in the data, and token budgets."""
        return {"samples": self.batches, "micro_batches": self.micro_batches}

    def read(self, outputs: Batch, name: str) -> Jagged:
        """Return the column ``name`` of what a forward pass computed, which may be in worker processes."""
        return self.executor.compute(_column, outputs.select(name), name)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, with all tokens that end an answer, into ``folder``."""
        save_tokenizer(self.tokenizer, self.stop_tokens, folder)

    def about(self) -> list[tuple[str, str]]:
        """Return what the run consists of, for its start banner."""
        config, budgets = self.config, self.micro_batches
        models = model_rows(self.executor, self.actor, config.model, budgets, self.tokenizer, self.end_tokens)
        samples = f"{self.batches.samples:,} samples; {config.data.train_batch_size} in a step"
        return [*models, ("data", samples), *(("", note) for note in self.notes)]


def _column(batch: Batch, name: str) -> Jagged:
    column: Jagged = batch[name]
    return column


def train_on_dataset(
    recipe: str,
    config: C,
    load: LoadSamples,
    step: Step[C],
    validate: Validate[C],
    *,
    prepare: Callable[[DatasetSession[C]], None] | None = None,
) -> None:
    """Train as ``config`` says, from the beginning or from the last checkpoint, to the last step.

    Args:
        recipe: its name, for messages and checkpoints.
        load: reads the samples.
        step: makes the step of that number (from 1) and returns its metrics, ``perf/total_num_tokens`` among them.
        validate: measures the model on the session's ``held_out``.
        prepare: called before the first step and before a checkpoint is loaded.

    Raises:
        RlcoreError: see `open_dataset_session` and `train`.
    """
    with open_dataset_session(config, load) as session:
        if prepare is not None:
            prepare(session)
        validates = session.held_out is not None
        train(Run(recipe, session, partial(step, session), partial(validate, session) if validates else None))


@contextmanager
def open_dataset_session(config: C, load: LoadSamples) -> Iterator[DatasetSession[C]]:
    """Read the data, then build the models; close them at the end.

    Raises:
        RlcoreError: something in the input is missing, broken or in the way. Nothing has been written then.
    """
    data, trainer = config.data, config.trainer
    validates = trainer.test_freq > 0
    check_sources(config, [*data.train_files, *(data.val_files if validates else ())])
    tokenizer = load_tokenizer(config.model)
    size, model_ends = model_tokens(config.model)
    dataset = load(data, data.train_files, tokenizer, None, size)
    held_out = load(data, data.val_files, tokenizer, data.val_limit, size) if validates else None
    batches = _batches(config, dataset)
    total_steps = trainer.total_steps or trainer.total_epochs * batches.steps_per_epoch
    limit = f"longer than data.max_length={data.max_length}"
    first = f" (the first: {dataset.first_filtered})" if dataset.first_filtered else ""
    overlong = [f"{dataset.filtered:,} samples are {limit} and left out{first}"] if dataset.filtered else []
    with ExitStack() as stack:
        stack.callback(batches.close)
        executor = open_executor(config.controller, config.roles, trainer.out_dir, stack)
        actor, ref = _engines(config, executor, total_steps, stack)
        models = {"actor": Model(actor, config.actor)}
        if ref is not None and config.ref_role is not None:
            models["ref"] = Model(ref, config.ref_role)
        largest = -(-data.train_batch_size * data.rows_per_sample // actor.dp_size) * data.max_length
        yield DatasetSession(
            config=config,
            executor=executor,
            actor=actor,
            ref=ref,
            micro_batches=MicroBatches(executor, models, data.max_length, largest),
            tokenizer=tokenizer,
            batches=batches,
            held_out=held_out,
            total_steps=total_steps,
            timed=Timings(executor),
            end_tokens=model_ends | dataset.ends,
            stop_tokens=missing_ends(config.model, tokenizer, dataset.ends),
            notes=(*dataset.notes, *overlong),
            stack=stack,
        )


def _engines(
    config: SampleTaskConfig, executor: Executor, total_steps: int, stack: ExitStack
) -> tuple[TrainEngine, TrainEngine | None]:
    """Build the model under training and, where the task has one, the reference model; ``stack`` closes them."""
    engine = partial(train_engine, seed=config.seed, max_length=config.data.max_length)
    optim = with_total_steps(config.actor.optim, total_steps)
    factory = partial(
        engine, config.actor, config.model, head=config.head, head_outputs=config.head_outputs, optim=optim
    )
    actor: TrainEngine = executor.build("actor", TrainEngine, factory)  # type: ignore[type-abstract]
    stack.callback(closed, actor)
    if config.ref_role is None or not config.builds_ref:
        return actor, None
    factory = partial(engine, config.ref_role, config.ref_role.model or config.model, policy=config.actor)
    ref: TrainEngine = executor.build("ref", TrainEngine, factory)  # type: ignore[type-abstract]
    stack.callback(closed, ref)
    return actor, ref


def _batches(config: SampleTaskConfig, dataset: SampleDataset[Any]) -> BatchLoader:
    weights = config.data.weights
    if config.data.mix is not None:
        dataset, weights = by_source(dataset, config.data.mix)
    return BatchLoader(
        dataset,
        dataset.file_sizes,
        config.data.train_batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        weights=weights,
        fingerprints=dataset.fingerprints,
    )
