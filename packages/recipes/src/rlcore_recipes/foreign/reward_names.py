"""Arguments of TRL's RewardConfig and PRMConfig, and of OpenRLHF's train_rm, that are about reward models alone."""

from __future__ import annotations

from rlcore_recipes.foreign.names import Equivalent

TRL_REWARDS: dict[str, Equivalent] = {
    "center_rewards_coefficient": Equivalent(("actor.objective.loss.centering",)),
    "step_separator": Equivalent(("data.step_separator",)),
    "train_on_last_step_only": Equivalent(("data.step_labels_key",), "null labels leave steps out"),
    "max_completion_length": Equivalent(("data.max_length",), "the whole sample, prompt included"),
    "max_prompt_length": Equivalent(("data.max_length",), "the whole sample, prompt included"),
    "disable_dropout": Equivalent((), "nothing to set: models are trained without dropout"),
}

OPENRLHF_REWARDS: dict[str, Equivalent] = {
    "margin_loss": Equivalent(("data.margin_key",), "a column of margins is used where a file has it"),
    "loss": Equivalent(("actor.objective.loss",), "sigmoid: bradley_terry"),
    "compute_fp32_loss": Equivalent((), "nothing to set: losses are computed in fp64"),
    "value_head_prefix": Equivalent((), "nothing to set: the head is score, as in transformers"),
}
