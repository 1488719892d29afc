"""Arguments of TRL's DPOConfig, KTOConfig, CPOConfig and ORPOConfig, and of OpenRLHF's train_dpo, that mean something
else, or nothing, outside of preference optimisation."""

from __future__ import annotations

from rlcore_recipes.foreign.names import Equivalent

_LOSS = "actor.objective.loss"

TRL_PREFERENCES: dict[str, Equivalent] = {
    "beta": Equivalent((f"{_LOSS}.beta",)),
    "loss_type": Equivalent(
        (_LOSS,),
        "sigmoid: dpo, robust: robust-dpo, sigmoid_norm: ln-dpo, exo_pair: exo, nca_pair: nca, sppo_hard: sppo, "
        "apo_zero: apo-zero, apo_down: apo-down",
    ),
    "label_smoothing": Equivalent((f"{_LOSS}.label_smoothing",)),
    "rpo_alpha": Equivalent(("actor.objective.sft_coeff",)),
    "simpo_gamma": Equivalent((f"{_LOSS}.gamma",)),
    "cpo_alpha": Equivalent((f"{_LOSS}.alpha",)),
    "reference_free": Equivalent((_LOSS,), "cpo with alpha 0 compares with no reference"),
    "ref_model": Equivalent(("ref.model.path",)),
    "ref_model_name_or_path": Equivalent(("ref.model.path",)),
    "precompute_ref_log_probs": Equivalent(("precompute_ref",)),
    "max_prompt_length": Equivalent(("data.max_length",), "the whole side, prompt included"),
    "max_completion_length": Equivalent(("data.max_length",), "the whole side, prompt included"),
    "truncation_mode": Equivalent(("data.overlong",), "keep_start: truncate; prompts are never cut"),
    "disable_dropout": Equivalent((), "nothing to set: models are trained without dropout"),
}

OPENRLHF_PREFERENCES: dict[str, Equivalent] = {
    "ref_pretrain": Equivalent(("ref.model.path",)),
    "ipo": Equivalent((_LOSS,), "ipo"),
    "nll_loss_coef": Equivalent(("actor.objective.sft_coeff",)),
    "ref_offload": Equivalent(("ref.offload",)),
    "label_key": Equivalent(("data.label_key",)),
}
