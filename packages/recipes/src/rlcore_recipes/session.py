"""What the steps of a reinforcement-learning run work with: models, prompts, tokenizer, and the loop around them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar
from warnings import warn

from pydantic import Field

from rlcore.algorithms.kl import KLController, kl_controller
from rlcore.batch import Batch
from rlcore.controller import Executor
from rlcore.errors import ConfigError, RlcoreWarning
from rlcore.json_file import Finite, JsonFile
from rlcore_recipes.asynchronous import Producer, open_producer
from rlcore_recipes.banner import model_rows
from rlcore_recipes.collect import release, sampled_and_scored
from rlcore_recipes.data.end_tokens import missing_ends, model_tokens, save_tokenizer
from rlcore_recipes.data.loader import PromptLoader
from rlcore_recipes.data.prompts import PromptDataset, PromptSample, load_prompts
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.micro_batches import MicroBatches
from rlcore_recipes.other_models import check_other_models
from rlcore_recipes.preflight import check_sources
from rlcore_recipes.processes import is_main, launched_as_main
from rlcore_recipes.roles import Roles, build_roles, open_executor
from rlcore_recipes.rollouts import validation_sampling
from rlcore_recipes.settings import CriticSettings, DynamicSamplingSettings, RLConfig
from rlcore_recipes.timing import Timings, open_trace
from rlcore_recipes.train_loop import Run, Stateful, train
from rlcore_recipes.updates import sync_policy
from rlcore_recipes.validation import Validation, validate_prompts

C = TypeVar("C", bound=RLConfig)
Validate = Callable[["Session[Any]"], Validation]


@dataclass
class Session(Generic[C]):
    """The parts of one run.

    Attributes:
        executor: runs the engines, and what needs the tokens of a batch (`Executor.compute`).
        prompts: endless batches of training prompts.
        val_prompts: None where nothing is validated.
        kl: holds the coefficient of the KL penalty in the reward; None without one.
        dynamic: which groups are worth training on; None: all.
        end_tokens: end a completion; the model's and ``stop_tokens``.
        stop_tokens: end a completion besides the model's end tokens.
        version: of the policy in the rollout processes: how many steps it has behind it.
        micro_batches: the models' token budgets.
        producer: generates while steps train, in asynchronous training only.
        validate: measures the policy on ``val_prompts``.
        warned: subjects of `warn_once`.
    """

    config: C
    executor: Executor
    roles: Roles
    micro_batches: MicroBatches
    tokenizer: Any
    prompts: PromptLoader
    val_prompts: PromptDataset | None
    kl: KLController | None
    total_steps: int
    timed: Timings
    dynamic: DynamicSamplingSettings | None = None
    end_tokens: frozenset[int] = frozenset()
    stop_tokens: tuple[int, ...] = ()
    version: int = 0
    producer: Producer | None = None
    validate: Validate | None = None
    warned: set[str] = field(default_factory=set)

    def warn_once(self, subject: str, message: str) -> None:
        """Warn with ``message``, unless the run was warned about ``subject`` before."""
        if subject not in self.warned and is_main():
            warn(message, RlcoreWarning, stacklevel=2)
        self.warned.add(subject)


@contextmanager
def open_session(
    config: C,
    *,
    critic: CriticSettings | None = None,
    dynamic: DynamicSamplingSettings | None = None,
    validate: Validate | None = None,
) -> Iterator[Session[C]]:
    """Read the data, then build the models; closes them at the end. For a recipe that is `restarting`.

    Args:
        critic: its settings; None where the run has none.
        dynamic: dynamic sampling; None: steps train on all groups.
        validate: how the recipe is validated, on samples that are made as those of its steps. `validate_completions`
            is for steps that train on single completions (`rlcore_recipes.collect.training_batch`). None: the recipe
            cannot be validated.

    Raises:
        ConfigError: the configuration asks for validation, and ``validate`` is None.
        RlcoreError: something in the input is missing, broken or in the way. Nothing has been written then.
    """
    data, trainer = config.data, config.trainer
    check_validated(config, validate)
    if launched_as_main():
        config.warn_of_doubts()
    check_sources(config, [*data.train_files, *(data.val_files if trainer.test_freq > 0 else ())])
    tokenizer = load_tokenizer(config.model)
    check_other_models(config, critic, tokenizer)
    dataset, val_prompts, ends = read_prompts(config, tokenizer)
    stop_tokens = missing_ends(config.model, tokenizer, ends)
    end_tokens = model_tokens(config.model)[1].union(stop_tokens)
    prompts, total_steps = prompts_of_steps(config, dataset, dynamic)
    penalty = config.algorithm.kl_in_reward
    with ExitStack() as stack:
        executor = open_executor(config.controller, config.roles, trainer.out_dir, stack)
        roles = build_roles(config, executor, critic, total_steps, end_tokens, stack)
        session = Session(
            config=config,
            executor=executor,
            roles=roles,
            micro_batches=micro_batches(config, executor, roles, critic),
            tokenizer=tokenizer,
            prompts=prompts,
            val_prompts=val_prompts,
            kl=None if penalty is None else kl_controller(penalty),
            total_steps=total_steps,
            timed=Timings(executor, open_trace(trainer.out_dir, stack) if config.trace else None),
            dynamic=dynamic,
            validate=validate,
            end_tokens=end_tokens,
            stop_tokens=stop_tokens,
        )
        follow_replacements(session)
        if config.asynchronous.max_staleness > 0:
            session.producer = open_producer(session)
            stack.callback(session.producer.close)
        yield session


def prompts_of_steps(
    config: RLConfig, dataset: PromptDataset, dynamic: DynamicSamplingSettings | None
) -> tuple[PromptLoader, int]:
    """Where the steps of a run take their prompts from, and the number of steps."""
    data, trainer = config.data, config.trainer
    loader = partial(PromptLoader, dataset, seed=config.seed, shuffle=data.shuffle, weights=data.weights)
    batches = loader(data.train_batch_size)  # checks sizes and counts steps even where others are drawn
    total_steps = trainer.total_steps or trainer.total_epochs * batches.steps_per_epoch
    # with dynamic sampling, how many prompts a step takes is known only while it samples
    return batches if dynamic is None else loader(1), total_steps


def check_validated(config: RLConfig, validate: Validate | None) -> None:
    """Make sure that the recipe says how it is validated, if the configuration asks for that."""
    if config.trainer.test_freq > 0 and validate is None:
        raise ConfigError(
            f"trainer.test_freq={config.trainer.test_freq} asks for validation, and the recipe does not say what it "
            "validates on: set trainer.test_freq=-1, or let the recipe's run give open_session a validate function "
            "(validate_completions if its steps train on single completions)"
        )


def read_prompts(config: RLConfig, tokenizer: Any) -> tuple[PromptDataset, PromptDataset | None, frozenset[int]]:
    """The prompts to train on; those to validate on, None where nothing is validated; tokens that end answers."""
    data = config.data
    size, _ = model_tokens(config.model)
    train_prompts = load_prompts(data, data.train_files, tokenizer, vocabulary=size)
    if config.trainer.test_freq <= 0:
        return train_prompts, None, train_prompts.ends
    val_prompts = load_prompts(data, data.val_files, tokenizer, data.val_limit, size)
    return train_prompts, val_prompts, train_prompts.ends | val_prompts.ends


def micro_batches(config: RLConfig, executor: Executor, roles: Roles, critic: CriticSettings | None) -> MicroBatches:
    """Token budgets that fit into memory, once all models are built."""
    longest = config.data.longest_sequence
    samples = config.data.train_batch_size * config.rollout.n
    largest = -(-samples // roles.actor.dp_size) * longest
    return MicroBatches(executor, roles.models(config, critic), longest, largest)


def follow_replacements(session: Session[Any]) -> None:
    """Give rollout processes that were put in the place of dead ones the policy's weights.

    Only the thread that trains does so, as it is never in the middle of an update then. Processes whose replacement
    another thread asked for wait for it.
    """
    trainer = threading.current_thread()

    def catch_up() -> None:
        if threading.current_thread() is trainer:
            sync_policy(session, session.version)

    session.executor.on_replaced(catch_up)


def train_rl(session: Session[C], recipe: str, step: Callable[[Session[C], int], dict[str, float]]) -> None:
    """Train with ``step`` until the end (see `train`)."""
    roles = session.roles
    parts: dict[str, Stateful] = {
        "prompts": session.producer or session.prompts,
        "micro_batches": session.micro_batches,
    }
    if session.kl is not None:
        parts["kl"] = _SavedKL(session.kl)
    train(
        Run(
            recipe=recipe,
            config=session.config,
            trainer=session.config.trainer,
            seed=session.config.seed,
            total_steps=session.total_steps,
            step=lambda number: step(session, number),
            validate=None if session.val_prompts is None else partial(_validated, session),
            engines=roles.trained(),
            parts=parts,
            resumed=lambda done: sync_policy(session, version=done),
            save_tokenizer=partial(save_tokenizer, session.tokenizer, session.stop_tokens),
            timed=session.timed,
            apply=session.executor.apply,
            about=lambda: about(session),
            max_error_ratio=session.config.reward.max_error_ratio,
        )
    )


def _validated(session: Session[Any]) -> Validation:
    assert session.validate is not None
    return session.validate(session)


def about(session: Session[Any]) -> list[tuple[str, str]]:
    """What the run consists of, for its start banner."""
    config, size = session.config, session.config.data.train_batch_size
    prompts = f"{session.prompts.samples:,} prompts; {size} × {config.rollout.n} completions in a step"
    if session.val_prompts is not None:
        prompts += f"; {len(session.val_prompts):,} prompts for validation"
    actor, budgets = session.roles.actor, session.micro_batches
    models = model_rows(session.executor, actor, config.model, budgets, session.tokenizer, session.end_tokens)
    return [*models, ("data", prompts)]


def validate_completions(session: Session[Any]) -> Validation:
    """Validate on single completions of the held-out prompts, sampled as ``rollout.validation`` says."""
    config = session.config
    sampling = validation_sampling(config.rollout, config.data.max_response_length, session.stop_tokens)
    n = config.rollout.validation.n

    def answer(prompts: Sequence[PromptSample]) -> Batch:
        return sampled_and_scored(session, prompts, sampling, n, purpose="validation")

    assert session.val_prompts is not None
    outcome = validate_prompts(
        session.executor,
        session.val_prompts,
        answer,
        config.data.val_batch_size,
        config.trainer.log_val_generations,
        partial(session.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    )
    release(session)
    return outcome


class KLState(JsonFile):
    """What a checkpoint holds of the controller of the KL coefficient."""

    coeff: Finite = Field(ge=0, description="The coefficient.")


@dataclass(frozen=True)
class _SavedKL:
    controller: KLController

    described_by = KLState

    def state(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(dict(state))
