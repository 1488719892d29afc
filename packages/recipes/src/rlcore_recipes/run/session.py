"""The session of a reinforcement-learning run: everything that its steps use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from warnings import warn

from pydantic import Field

from rlcore.algorithms.kl import KLController
from rlcore.controller import Executor
from rlcore.engines import TrainEngine
from rlcore.errors import RlcoreWarning
from rlcore_kit.checkpoint.json_file import Finite, JsonFile
from rlcore_recipes.data.end_tokens import save_tokenizer
from rlcore_recipes.data.loader import PromptLoader
from rlcore_recipes.data.prompts import PromptDataset
from rlcore_recipes.ranks import is_main
from rlcore_recipes.rollouts.source import GroupSource
from rlcore_recipes.rollouts.workers import RolloutWorkers
from rlcore_recipes.run.banner import model_rows
from rlcore_recipes.run.micro_batches import MicroBatches
from rlcore_recipes.run.records import Records
from rlcore_recipes.run.roles import Roles
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.run.trainable import Stateful
from rlcore_recipes.settings import RLConfig

C = TypeVar("C", bound=RLConfig)


@dataclass
class Session(Generic[C]):
    """The parts of one run; `rlcore_recipes.run.open.open_session` makes it.

    Attributes:
        executor: runs the engines, and what needs the tokens of a batch (`Executor.compute`).
        roles: the worker groups.
        workers: those of them that roll samples out.
        groups: makes the groups that steps train on, from ``prompts``.
        val_prompts: None if nothing is validated.
        kl: holds the coefficient of the KL penalty in the reward; None without one.
        end_tokens: tokens that end a completion: the model's, and ``stop_tokens``.
        stop_tokens: tokens that end a completion in addition to the model's end tokens.
        version: of the policy in the rollout processes: the number of steps that it was trained for.
        ref_version: of the reference policy, if a recipe renews it: the number of steps that it was trained for.
        micro_batches: the models' token budgets.
        notes: what was recognised in the data, and how many prompts were too long.
        warned: subjects of `warn_once`.
        records: what the step under way has for trackers besides metrics.
    """

    config: C
    executor: Executor
    roles: Roles
    workers: RolloutWorkers
    micro_batches: MicroBatches
    tokenizer: Any
    prompts: PromptLoader
    val_prompts: PromptDataset | None
    kl: KLController | None
    total_steps: int
    timed: Timings
    groups: GroupSource = field(init=False)
    end_tokens: frozenset[int] = frozenset()
    stop_tokens: tuple[int, ...] = ()
    version: int = 0
    ref_version: int = 0
    notes: tuple[str, ...] = ()
    warned: set[str] = field(default_factory=set)
    records: Records = field(default_factory=Records)

    @property
    def max_error_ratio(self) -> float:
        """Share of samples whose reward may fail over some steps."""
        return self.config.reward.max_error_ratio

    @property
    def max_invalid_ratio(self) -> float:
        """Share of episodes that may be invalid over some steps."""
        environment = self.config.rollout.environment
        return 1.0 if environment is None else environment.max_invalid_ratio

    @property
    def engines(self) -> dict[str, TrainEngine]:
        """The engines whose state is in every checkpoint."""
        return self.roles.trained()

    @property
    def parts(self) -> dict[str, Stateful]:
        """Further state of a checkpoint: the position in the data, token budgets, the coefficient of the KL penalty."""
        kl: dict[str, Stateful] = {} if self.kl is None else {"kl": SavedKL(self.kl)}
        return {"prompts": self.groups, "micro_batches": self.micro_batches, **kl}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, with all tokens that end a completion, into ``folder``."""
        save_tokenizer(self.tokenizer, self.stop_tokens, folder)

    def about(self) -> list[tuple[str, str]]:
        """Return what the run consists of, for its start banner."""
        config = self.config
        sizes = f"{config.data.train_batch_size} × {config.rollout.n} completions in a step"
        prompts = f"{self.prompts.samples:,} prompts; {sizes}"
        if self.val_prompts is not None:
            prompts += f"; {len(self.val_prompts):,} prompts for validation"
        actor, budgets = self.roles.actor, self.micro_batches
        models = model_rows(self.executor, actor, config.model, budgets, self.tokenizer, self.end_tokens)
        if config.needs_ref and not config.builds_ref:
            models.append(("reference", "the actor without its adapters"))
        if (environment := config.rollout.environment) is not None:
            limits = f"at most {environment.max_turns} turns and {environment.timeout_s:g} s in an episode"
            models.append(("environment", f"{environment.name}, {limits}"))
        return [*models, ("data", prompts), *(("", note) for note in self.notes)]

    def warn_once(self, subject: str, message: str) -> None:
        """Warn with ``message``, unless the run was warned about ``subject`` before."""
        if subject not in self.warned and is_main():
            warn(message, RlcoreWarning, stacklevel=2)
        self.warned.add(subject)


class KLState(JsonFile):
    """What a checkpoint holds of the controller of the KL coefficient."""

    coeff: Finite = Field(ge=0, description="The coefficient.")


@dataclass(frozen=True)
class SavedKL:
    """The controller of the KL coefficient as a part of a run's state."""

    controller: KLController

    described_by = KLState

    def state(self) -> dict[str, Any]:
        """Return the coefficient."""
        return self.controller.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the coefficient in ``state``."""
        self.controller.load_state_dict(dict(state))
