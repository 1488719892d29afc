"""Building the engines that take part in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcore import plugins
from rlcore.config import Config
from rlcore.engines import (
    ModelSettings,
    OptimSettings,
    RolloutEngine,
    RolloutSpec,
    TrainEngine,
    TrainEngineSpec,
)
from rlcore.engines.settings import Head, adapter_rank
from rlcore.errors import WorkerError
from rlcore_recipes.rollouts.environment import closing_runners
from rlcore_recipes.rollouts.scorer import Scorer, build_scorer
from rlcore_recipes.run.folder import LOGS
from rlcore_recipes.run.micro_batches import Model
from rlcore_recipes.settings import ControllerSettings, CriticSettings, ModelRole, RLConfig
from rlcore_recipes.settings.roles import AUTO, DEFAULT_TOKENS, FollowingRole

if TYPE_CHECKING:
    from rlcore.controller import Executor


@dataclass(frozen=True)
class Roles:
    """Worker groups, each called as if it were one engine.

    Attributes:
        ref: None if there is no reference policy, or if it is the actor without its adapters.
        frozen: those of ``config.frozen_models``.
    """

    actor: TrainEngine
    rollout: RolloutEngine
    reward: Any
    ref: TrainEngine | None = None
    critic: TrainEngine | None = None
    reward_model: TrainEngine | None = None
    prm: TrainEngine | None = None
    frozen: Mapping[str, TrainEngine] = field(default_factory=dict)

    def trained(self) -> dict[str, TrainEngine]:
        """Return the engines whose state belongs in a checkpoint."""
        found = {"actor": self.actor, "critic": self.critic, "prm": self.prm}
        return {name: engine for name, engine in found.items() if engine is not None}

    def models(self, config: RLConfig) -> dict[str, Model]:
        """Return the models in training engines, by the names of their sections."""
        found = {
            "actor": (self.actor, config.actor),
            "critic": (self.critic, config.critic_role),
            "ref": (self.ref, config.ref),
            "reward_model": (self.reward_model, config.reward_model),
            "prm": (self.prm, config.prm_role),
            **{name: (engine, config.frozen_models[name]) for name, engine in self.frozen.items()},
        }
        return {
            name: Model(group, role) for name, (group, role) in found.items() if group is not None and role is not None
        }


def engine_of(role: ModelRole, policy: ModelRole | None = None) -> tuple[str, Config]:
    """Return the name of the engine of ``role``, and its options.

    Args:
        policy: the role whose engine a `FollowingRole` takes unless it names one.
    """
    if policy is not None and isinstance(role, FollowingRole):
        return role.engine_with(policy)
    return role.engine, role.options


def train_engine(
    role: ModelRole,
    model: ModelSettings,
    engines: Mapping[str, Any] | None = None,
    *,
    policy: ModelRole | None = None,
    head: Head = "policy",
    head_outputs: int = 1,
    optim: OptimSettings | None = None,
    seed: int = 0,
    max_length: int | None = None,
) -> TrainEngine:
    """Build the engine of ``role``; ``engines`` are the other engines of its process.

    Args:
        policy: see `engine_of`.
        optim: None freezes the model, which then needs its head in its files.
        max_length: longest sequence that the run may make, in tokens; None if unknown.
    """
    name, options = engine_of(role, policy)
    budget = role.max_tokens_per_micro_batch
    spec = TrainEngineSpec(
        model=model,
        options=options,
        head=head,
        optim=optim,
        max_tokens=DEFAULT_TOKENS if budget == AUTO else budget,  # `MicroBatches` sets what fits, once all is built
        seed=seed,
        max_length=max_length,
        new_head=optim is not None,
        head_outputs=head_outputs,
    )
    engine: TrainEngine = plugins.get(role.plugin_group, name).build(spec)
    if role.offload:
        engine.offload()  # it comes back by itself when it is used
    return engine


def rollout_engine(config: RLConfig, actor: TrainEngine | None) -> RolloutEngine:
    """Build the engine that ``config.rollout`` names, in the process of ``actor`` (an engine) or without one."""
    spec = RolloutSpec(
        model=config.model,
        options=config.rollout.options,
        max_model_len=config.data.longest_sequence,
        seed=config.seed,
        train_engine=actor,
        adapter_rank=adapter_rank(config.actor.options),
    )
    return plugins.get(config.rollout.plugin_group, config.rollout.engine).build(spec)  # type: ignore[no-any-return]


def _rollout_with_actor(config: RLConfig, engines: Mapping[str, Any]) -> RolloutEngine:
    engine = rollout_engine(config, engines.get("actor"))
    return engine if config.rollout.environment is None else closing_runners(engine)


def open_executor(controller: ControllerSettings, roles: Sequence[str], out_dir: Path, stack: ExitStack) -> Executor:
    """Start the executor for the engines of ``roles``; ``stack`` closes it. Worker processes write logs to ``out_dir``.

    Raises:
        PlacementError: the processes do not fit into the cluster.
        ConfigError: there is no cluster at ``controller.address``.
    """
    executor = controller.backend(roles, logs=out_dir.resolve() / LOGS).start()
    stack.callback(executor.close)
    return executor


def build_roles(
    config: RLConfig,
    executor: Executor,
    total_steps: int,
    ends: frozenset[int],
    stack: ExitStack,
) -> Roles:
    """Build what ``config`` asks for; ``stack`` closes it.

    Args:
        total_steps: steps of the run, from which learning-rate schedules get their length.
        ends: tokens that end a completion.
    """

    def built(role: str, interface: Any, factory: Callable[..., Any]) -> Any:
        group = executor.build(role, interface, factory)
        stack.callback(closed, group)
        return group

    critic = config.critic_role
    reward = built("reward", Scorer, partial(build_scorer, config.reward, config.model, ends))
    updates = config.scheduled_updates(total_steps - skipped_by_warmup(critic))
    optim = with_total_steps(config.actor.optim, updates)
    engine = partial(train_engine, seed=config.seed, max_length=config.data.longest_sequence)
    actor = built("actor", TrainEngine, partial(engine, config.actor, config.model, optim=optim))
    following = partial(engine, policy=config.actor)
    ref = value = scorer = prm = None
    if config.builds_ref:
        model = config.ref.model or config.model
        ref = built("ref", TrainEngine, partial(following, config.ref, model))
    if critic is not None:
        optim = with_total_steps(critic.optim, total_steps * updates_per_step(config, *config.critic_sizes))
        model = critic.model or config.model
        factory = partial(following, critic, model, head="value", optim=optim)
        value = built("critic", TrainEngine, factory)
    if config.reward_model is not None:
        role = config.reward_model
        factory = partial(following, role, role.model, head="score", head_outputs=role.outputs)
        scorer = built("reward_model", TrainEngine, factory)
    if config.prm_role is not None:
        optim = with_total_steps(config.prm_role.optim, total_steps * updates_per_step(config, *config.prm_sizes))
        model = config.prm_role.model or config.model
        prm = built("prm", TrainEngine, partial(following, config.prm_role, model, optim=optim))
    frozen = {
        name: built(name, TrainEngine, partial(following, role, role.model or config.model))
        for name, role in config.frozen_models.items()
    }
    rollout = built("rollout", RolloutEngine, partial(_rollout_with_actor, config))
    executor.barrier("build")
    return Roles(actor, rollout, reward, ref, value, scorer, prm, frozen)


def closed(group: Any) -> None:
    """Close the engines of ``group``, unless what runs them is gone."""
    with suppress(WorkerError):
        group.close()


def updates_per_step(config: RLConfig, prompts: int, epochs: int) -> int:
    """Return the number of optimizer steps for one batch of a model with mini-batches of so many ``prompts``."""
    return config.data.train_batch_size // prompts * epochs


def skipped_by_warmup(critic: CriticSettings | None) -> int:
    """Return the number of steps before the actor is updated for the first time."""
    return max(critic.warmup_steps - 1, 0) if critic is not None else 0


def with_total_steps(optim: OptimSettings, steps: int) -> OptimSettings:
    """``optim`` with the length of the run as the schedule's, unless it has one."""
    return optim if optim.total_steps is not None else optim.model_copy(update={"total_steps": max(steps, 1)})
