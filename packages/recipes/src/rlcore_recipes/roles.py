"""Building the engines that take part in a run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from rlcore import plugins
from rlcore.engines import (
    ModelSettings,
    OptimSettings,
    Reward,
    RolloutEngine,
    RolloutSpec,
    TrainEngine,
    TrainEngineSpec,
)
from rlcore.engines.settings import Head
from rlcore_recipes.processes import executor
from rlcore_recipes.settings import CriticSettings, ModelRole, RewardRole, RLConfig

Closable = TypeVar("Closable", TrainEngine, RolloutEngine, Reward)


@dataclass(frozen=True)
class Roles:
    """Worker groups, each called as if it were one engine."""

    actor: TrainEngine
    rollout: RolloutEngine
    reward: Reward
    ref: TrainEngine | None = None
    critic: TrainEngine | None = None

    def trained(self) -> dict[str, TrainEngine]:
        """The engines whose state belongs in a checkpoint."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic is not None else {})


def train_engine(
    role: ModelRole, model: ModelSettings, *, head: Head = "policy", optim: OptimSettings | None = None, seed: int = 0
) -> TrainEngine:
    """The engine that ``role`` names, not yet in a worker group."""
    spec = TrainEngineSpec(
        model=model,
        options=role.options,
        head=head,
        optim=optim,
        max_tokens=role.max_tokens_per_micro_batch,
        seed=seed,
    )
    engine: TrainEngine = plugins.get(role.plugin_group, role.engine).build(spec)
    if role.offload:
        engine.offload()  # it comes back by itself when it is used
    return engine


def rollout_engine(config: RLConfig, actor: TrainEngine) -> RolloutEngine:
    """The engine that ``config.rollout`` names, beside ``actor`` (itself, not its worker group)."""
    spec = RolloutSpec(
        model=config.model,
        options=config.rollout.options,
        max_model_len=config.data.max_prompt_length + config.data.max_response_length,
        seed=config.seed,
        train_engine=actor,
    )
    return plugins.get(config.rollout.plugin_group, config.rollout.engine).build(spec)  # type: ignore[no-any-return]


def reward_of(role: RewardRole) -> Reward:
    """The reward that ``role`` names."""
    return plugins.get(role.plugin_group, role.name).build(role.options, role)  # type: ignore[no-any-return]


def build_roles(config: RLConfig, critic: CriticSettings | None, total_steps: int, stack: ExitStack) -> Roles:
    """Build what ``config`` asks for; ``stack`` closes it.

    Args:
        total_steps: steps of the run, from which learning-rate schedules get their length.
        critic: its settings; None where the run has none.
    """

    def closing(engine: Closable) -> Closable:
        stack.callback(engine.close)
        return engine

    reward = closing(reward_of(config.reward))
    updates = (total_steps - skipped_by_warmup(critic)) * config.updates_per_step
    optim = with_total_steps(config.actor.optim, updates)
    actor = closing(train_engine(config.actor, config.model, optim=optim, seed=config.seed))
    ref = value = None
    if config.needs_ref:
        ref = closing(train_engine(config.ref, config.ref.model or config.model, seed=config.seed))
    if critic is not None:
        optim = with_total_steps(critic.optim, total_steps * critic_updates_per_step(critic, config))
        model = critic.model or config.model
        value = closing(train_engine(critic, model, head="value", optim=optim, seed=config.seed))
    rollout = closing(rollout_engine(config, actor))
    return Roles(
        actor=grouped(actor, "actor"),
        rollout=executor.group(RolloutEngine, rollout, "rollout"),  # type: ignore[type-abstract]
        reward=reward,
        ref=None if ref is None else grouped(ref, "ref"),
        critic=None if value is None else grouped(value, "critic"),
    )


def grouped(engine: TrainEngine, role: str) -> TrainEngine:
    return executor.group(TrainEngine, engine, role)  # type: ignore[type-abstract]


def critic_updates_per_step(critic: CriticSettings, config: RLConfig) -> int:
    mini_batches = config.data.train_batch_size // (critic.mini_batch_size or config.mini_batch_size)
    return mini_batches * (critic.epochs or config.actor.epochs)


def skipped_by_warmup(critic: CriticSettings | None) -> int:
    """Steps before the actor is updated for the first time."""
    return max(critic.warmup_steps - 1, 0) if critic is not None else 0


def with_total_steps(optim: OptimSettings, steps: int) -> OptimSettings:
    """``optim`` with the length of the run as the schedule's, unless it has one."""
    return optim if optim.total_steps is not None else optim.model_copy(update={"total_steps": max(steps, 1)})
