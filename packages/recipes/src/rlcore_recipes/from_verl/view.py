"""The whole of a verl configuration, as conversions of single keys see it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlcore_recipes.from_verl.values import flag, number, whole

_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)(?:,[^}]*)?\}")

ACTOR, ROLLOUT, REF = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref")


class VerlView:
    """Values of verl's keys: given ones, else verl's defaults.

    Args:
        entry: the module that the command runs.
        given: by the names of the table.
        defaults: verl's, by the same names.
        names: of the table, by other names of verl for the same.
        supervised: the command fine-tunes without reinforcement learning.
    """

    def __init__(
        self,
        entry: str,
        given: Mapping[str, Any],
        defaults: Mapping[str, Any],
        names: Mapping[str, str],
        *,
        supervised: bool = False,
    ) -> None:
        self.entry = entry
        self.supervised = supervised
        self._given = given
        self._defaults = defaults
        self._names = names

    def given(self, name: str) -> bool:
        """Return whether the command sets ``name``."""
        return name in self._given

    def any_below(self, section: str) -> bool:
        """Return whether the command sets a key of ``section``."""
        return any(name.startswith(f"{section}.") for name in self._given)

    def get(self, name: str) -> Any:
        """Return the value of ``name``, references to other keys resolved; None without one and without default."""
        seen: set[str] = set()
        while True:
            value = self._given.get(name, self._defaults.get(name))
            reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
            if reference is None or name in seen:
                return value
            seen.add(name)
            name = self._names.get(reference[1], reference[1])

    def flag(self, name: str) -> bool:
        """Return whether ``name`` is true."""
        return flag(self.get(name))

    def whole(self, name: str) -> int:
        """Return the whole number ``name``."""
        return whole(self.get(name), name)

    def number(self, name: str) -> float:
        """Return the number ``name``."""
        return number(self.get(name), name)

    # --- what follows from several keys ------------------------------------------------------------------------------

    @property
    def recipe(self) -> str:
        """The recipe that does what the command does."""
        if self.supervised:
            return "sft"
        if self.has_critic:
            return "ppo"
        return "dapo" if self.flag("algorithm.filter_groups.enable") else "grpo"

    @property
    def has_critic(self) -> bool:
        """Whether a critic takes part."""
        return not self.supervised and str(self.get("algorithm.adv_estimator")) == "gae"

    @property
    def actor_is_reference(self) -> bool:
        """Whether the reference is the actor without its adapters, and not a second model."""
        name = f"actor_rollout_ref.model.{'lora.rank' if self.engine == 'megatron' else 'lora_rank'}"
        return whole(self.get(name) or 0, name) > 0 and not self.given(f"{REF}.model.path")

    @property
    def asynchronous(self) -> bool:
        """Whether rollout and training run on different GPUs."""
        return "async" in self.entry or "one_step_off" in self.entry or self.any_below("async_training")

    @property
    def engine(self) -> str:
        """Training engine of rlcore for verl's strategy."""
        strategy = self.get("engine.strategy" if self.supervised else f"{ACTOR}.strategy")
        if "megatron" in (strategy, self.get("engine"), self.get("model_engine")):
            return "megatron"
        own = "engine.tensor_model_parallel_size" if self.supervised else f"{ACTOR}.megatron"
        given = self.given(own) if self.supervised else self.any_below(own)
        return "megatron" if given and not self.given(f"{ACTOR}.strategy") else "fsdp"

    @property
    def rollout_engine(self) -> str | None:
        """Rollout engine of rlcore for verl's; None if rlcore has none."""
        names = {"vllm": "vllm", "sglang": "sglang", "hf": "inline", "tgi": "http"}
        name = str(self.get(f"{ROLLOUT}.name"))
        return names.get(name.removesuffix("_rollout"))

    @property
    def processes(self) -> int:
        """GPUs of training."""
        return self.whole("trainer.n_gpus_per_node") * self.whole("trainer.nnodes")

    @property
    def longest_sequence(self) -> int:
        """Maximum tokens of a prompt and its response."""
        if self.supervised:
            return self.whole("data.max_length")
        return self.whole("data.max_prompt_length") + self.whole("data.max_response_length")

    @property
    def batch(self) -> int:
        """Prompts of a step."""
        if self.any_below("async_training"):
            syncs = self.whole("async_training.trigger_parameter_sync_step")
            return self.mini_batch * syncs
        return self.whole("data.train_batch_size")

    @property
    def mini_batch(self) -> int:
        """Prompts of an optimizer step of the actor."""
        size = self.whole(f"{ACTOR}.ppo_mini_batch_size")
        return size * self.whole("async_training.require_batches") if self.any_below("async_training") else size

    def updates(self, role: str = "actor") -> int:
        """Return the optimizer steps that ``role`` makes in one step; verl's schedules count steps."""
        if self.supervised:
            return 1
        epochs = self.whole(f"{ACTOR}.ppo_epochs")
        size = self.mini_batch
        if role == "critic":
            size, epochs = (self.get("critic.ppo_mini_batch_size") or size, self.get("critic.ppo_epochs") or epochs)
        return max(self.batch // max(whole(size, "ppo_mini_batch_size"), 1), 1) * whole(epochs, "ppo_epochs")
