"""Open a run of reinforcement learning: read its data, build its models, train."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rlcore.algorithms.kl import kl_controller
from rlcore.controller import Executor
from rlcore.errors import ConfigError
from rlcore_recipes.data.end_tokens import missing_ends, model_tokens
from rlcore_recipes.data.loader import PromptLoader
from rlcore_recipes.data.prompts import PromptDataset, load_prompts
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.ranks import launched_as_main
from rlcore_recipes.rollouts.asynchronous import AsynchronousGroups
from rlcore_recipes.rollouts.environment import check_environment
from rlcore_recipes.rollouts.group_scheduler import GroupScheduler
from rlcore_recipes.rollouts.plan import training_plan
from rlcore_recipes.rollouts.prompt_queue import PromptQueue
from rlcore_recipes.rollouts.reward_model import RewardModel
from rlcore_recipes.rollouts.source import GroupSource
from rlcore_recipes.rollouts.synchronous import SynchronousGroups
from rlcore_recipes.rollouts.workers import RolloutWorkers
from rlcore_recipes.run.loop import train
from rlcore_recipes.run.micro_batches import MicroBatches
from rlcore_recipes.run.other_models import check_other_models
from rlcore_recipes.run.preflight import check_ground_truth, check_sources
from rlcore_recipes.run.roles import Roles, build_roles, open_executor
from rlcore_recipes.run.session import Session
from rlcore_recipes.run.timing import Timings, open_trace
from rlcore_recipes.run.trainable import Run, Validation
from rlcore_recipes.settings import RLConfig
from rlcore_recipes.step.weights import sync_weights

C = TypeVar("C", bound=RLConfig)
Step = Callable[[Session[C], int], dict[str, float]]
Validate = Callable[[Session[C]], Validation]


def train_rl(recipe: str, config: C, step: Step[C], validate: Validate[C] | None = None) -> None:
    """Train as ``config`` says, from the beginning or from the last checkpoint, to the last step.

    Args:
        recipe: its name, for messages and checkpoints.
        step: makes the step of that number (from 1) and returns its metrics, ``perf/total_num_tokens`` among them.
        validate: measures the policy on samples that are made as those of the steps. `validate_completions` is for
            steps that train on single completions. None: the recipe cannot be validated.

    Raises:
        ConfigError: the configuration asks for validation, and ``validate`` is None.
        RlcoreError: see `open_session` and `train`.
    """
    if config.trainer.test_freq > 0 and validate is None:
        raise ConfigError(
            f"trainer.test_freq={config.trainer.test_freq} asks for validation, and the recipe does not say what it "
            "validates on: set trainer.test_freq=-1, or let the recipe give train_rl a validate function "
            "(validate_completions if its steps train on single completions)"
        )
    with open_session(config) as session:
        train(rl_run(recipe, session, partial(step, session), validate))


def rl_run(
    recipe: str, session: Session[C], step: Callable[[int], dict[str, float]], validate: Validate[C] | None
) -> Run:
    """Return the run of ``session`` for `train`; for the arguments see `train_rl`."""
    return Run(
        recipe=recipe,
        session=session,
        step=step,
        validate=None if validate is None or session.val_prompts is None else partial(validate, session),
        resumed=partial(sync_weights, session),
    )


@contextmanager
def open_session(config: C, check: Callable[[C, RunData], None] | None = None) -> Iterator[Session[C]]:
    """Read the data, then build the models; close them at the end. For a recipe that is `restarting`.

    Args:
        check: what the recipe checks of the data before anything is built.

    Raises:
        RlcoreError: something in the input is missing, broken or in the way. Nothing has been written then.
    """
    if launched_as_main():
        config.warn_of_doubts()
    data = read_data(config)
    if check is not None:
        check(config, data)
    check_environment(training_plan(config, data.stop_tokens, data.end_tokens).episode)
    out_dir, penalty = config.trainer.out_dir, config.algorithm.kl_in_reward
    with ExitStack() as stack:
        executor = open_executor(config.controller, config.roles, out_dir, stack)
        roles = build_roles(config, executor, data.total_steps, data.end_tokens, stack)
        timed = Timings(executor, open_trace(out_dir, stack) if config.trace else None)
        session = Session(
            config=config,
            executor=executor,
            roles=roles,
            workers=rollout_workers(config, executor, roles, timed),
            micro_batches=micro_batches(config, executor, roles),
            tokenizer=data.tokenizer,
            prompts=data.prompts,
            val_prompts=data.val_prompts,
            kl=None if penalty is None else kl_controller(penalty),
            total_steps=data.total_steps,
            timed=timed,
            end_tokens=data.end_tokens,
            stop_tokens=data.stop_tokens,
            notes=data.notes,
        )
        session.groups = group_source(session)
        stack.callback(session.groups.close)
        follow_replacements(session)
        yield session


@dataclass(frozen=True)
class RunData:
    """The data that a run reads before it builds anything; see `Session` for the fields."""

    tokenizer: Any
    prompts: PromptLoader
    val_prompts: PromptDataset | None
    stop_tokens: tuple[int, ...]
    end_tokens: frozenset[int]
    total_steps: int
    notes: tuple[str, ...] = ()


def read_data(config: RLConfig) -> RunData:
    """Read the prompts and the tokenizer; check that all inputs are there and fit each other."""
    data, trainer = config.data, config.trainer
    validates = trainer.test_freq > 0
    check_sources(config, [*data.train_files, *(data.val_files if validates else ())])
    tokenizer = load_tokenizer(config.model)
    check_other_models(config, tokenizer)
    size, model_ends = model_tokens(config.model)
    dataset = load_prompts(data, data.train_files, tokenizer, vocabulary=size, response_key=config.response_key)
    val_prompts = load_prompts(data, data.val_files, tokenizer, data.val_limit, size) if validates else None
    found = [dataset] if val_prompts is None else [dataset, val_prompts]
    check_ground_truth(config.reward, *found)
    ends = dataset.ends if val_prompts is None else dataset.ends | val_prompts.ends
    stop_tokens = missing_ends(config.model, tokenizer, ends)
    loader = partial(PromptLoader, dataset, seed=config.seed, shuffle=data.shuffle, weights=data.weights)
    batches = loader(data.train_batch_size)  # checks sizes and counts steps even if others are drawn
    total_steps = trainer.total_steps or trainer.total_epochs * batches.steps_per_epoch
    # with dynamic sampling, how many prompts a step takes is known only while it samples
    prompts = batches if config.dynamic_sampling is None else loader(1)
    notes = tuple(note for read in found for note in (*read.notes, *overlong_notes(read, data)))
    return RunData(tokenizer, prompts, val_prompts, stop_tokens, model_ends.union(stop_tokens), total_steps, notes)


def overlong_notes(data: PromptDataset, settings: DataSettings) -> list[str]:
    """Return what happened to prompts that were too long, for the user."""
    limit = f"longer than data.max_prompt_length={settings.max_prompt_length}"
    left_out = [f"{data.filtered:,} prompts are {limit} and left out"] if data.filtered else []
    cut = [f"{data.cut:,} prompts are {limit} and cut ({settings.overlong_prompts})"] if data.cut else []
    long = [f"{data.long_responses:,} responses are longer than data.max_response_length, and their prompts left out"]
    return left_out + cut + long * (data.long_responses > 0)


def rollout_workers(config: RLConfig, executor: Executor, roles: Roles, timed: Timings) -> RolloutWorkers:
    """Return the worker groups that roll samples out."""
    model = None
    if roles.reward_model is not None and config.reward_model is not None:
        scored = config.reward_model, config.reward.error_score
        model = RewardModel(roles.reward_model, *scored, executor, timed, config.model)
    # after a validation, an engine that sleeps would leave the requests of groups in flight unanswered
    free_memory = config.rollout.free_memory and config.asynchronous.max_staleness == 0
    return RolloutWorkers(executor, roles.rollout, roles.reward, model, timed, free_memory)


def group_source(session: Session[Any]) -> GroupSource:
    """Return what makes the groups of steps: while the step waits, or ahead of it in asynchronous training."""
    config, plan = session.config, training_plan(session.config, session.stop_tokens, session.end_tokens)
    batch_size, dynamic = config.data.train_batch_size, config.dynamic_sampling
    rounds = 1 if dynamic is None else dynamic.max_generations
    if config.asynchronous.max_staleness == 0:
        return SynchronousGroups(session.workers, session.prompts, plan, batch_size, rounds)
    return AsynchronousGroups(
        session.workers,
        PromptQueue(session.prompts),
        GroupScheduler(batch_size, config.asynchronous.max_staleness, session.total_steps),
        plan,
        version=lambda: session.version,
        catch_up=partial(_catch_up, session),
        max_concurrent=config.asynchronous.max_concurrent_groups,
        max_drops=(rounds - 1) * batch_size,
        timeout_s=config.controller.call_timeout_s,
    )


def micro_batches(config: RLConfig, executor: Executor, roles: Roles) -> MicroBatches:
    """Return token budgets that fit into memory, once all models are built."""
    longest = config.data.longest_sequence
    samples = config.data.train_batch_size * config.rollout.n
    largest = -(-samples // roles.actor.dp_size) * longest
    return MicroBatches(executor, roles.models(config), longest, largest)


def follow_replacements(session: Session[Any]) -> None:
    """Send the policy's weights to rollout processes that replace dead ones.

    Only the thread that trains does so, as it is never in the middle of an update then. Processes whose replacement
    another thread asked for wait for it.
    """
    trainer = threading.current_thread()

    def catch_up() -> None:
        if threading.current_thread() is trainer:
            _catch_up(session)

    session.executor.on_worker_replaced(catch_up)


def _catch_up(session: Session[Any]) -> None:
    sync_weights(session, session.version)
