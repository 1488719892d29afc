"""The policy loss, its aggregation and its KL term: several keys of verl each, read together."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.from_verl.keys.entries import Convert, NoEquivalent, NothingToSet, Several, without
from rlcore_recipes.from_verl.view import VerlView

ACTOR = "actor_rollout_ref.actor"
OBJECTIVE = "actor.objective"
LOSS = f"{OBJECTIVE}.policy_loss"
CLIPPED = ("ppo", "gspo", "gmpo", "cispo")
LOSSES = {
    "vanilla": "ppo",
    "gspo": "gspo",
    "geo_mean": "gmpo",
    "cispo": "cispo",
    "sapo": "sapo",
    "gpg": "gpg",
    "reinforce": "reinforce",
}
"""rlcore's policy losses by verl's ``policy_loss.loss_mode``."""

PER_SEQUENCE = ("gspo", "gmpo", "sapo")
"""Losses that verl aggregates as seq-mean-token-mean, whatever ``loss_agg_mode`` says."""

ESTIMATORS = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
    "kl+": "k1+",
    "k1+": "k1+",
    "low_var_kl+": "k3+",
    "k3+": "k3+",
}
"""rlcore's KL estimators by verl's ``kl_loss_type`` and ``kl_penalty``."""


def loss_name(verl: VerlView) -> str:
    """Return rlcore's policy loss."""
    mode = str(verl.get(f"{ACTOR}.policy_loss.loss_mode"))
    if verl.flag("algorithm.rollout_correction.bypass_mode") and mode in ("vanilla", "bypass_mode"):
        mode = "reinforce" if verl.get("algorithm.rollout_correction.loss_type") == "reinforce" else "vanilla"
    if mode not in LOSSES:
        raise NoEquivalent(f"the policy losses are {', '.join(sorted(LOSSES.values()))}; this run has ppo")
    return LOSSES[mode]


def chosen_loss(verl: VerlView) -> str:
    """Return rlcore's policy loss, which is ppo where it has none like verl's."""
    try:
        return loss_name(verl)
    except NoEquivalent:
        return "ppo"


def loss_mode(value: Any, verl: VerlView) -> Several:
    """Return the policy loss; one that rlcore lacks is reported at this key."""
    return Several({f"{LOSS}.name": loss_name(verl)})


def clip_ratio(value: Any, verl: VerlView) -> Several:
    """Return the bounds, which verl takes from clip_ratio_low and clip_ratio_high unless they are null."""
    bounds = {side: verl.get(f"{ACTOR}.clip_ratio_{side}") for side in ("low", "high")}
    missing = [side for side, bound in bounds.items() if bound is None]
    if not missing:
        given = " and ".join(f"clip_ratio_{side}={bound}" for side, bound in bounds.items())
        raise NothingToSet(f"verl takes {given} instead, which have defaults")
    return Several({f"{LOSS}.clip_{side}": value for side in missing})


def clip_bound(side: str) -> Convert:
    """Return the conversion of the bound of one side."""

    def convert(value: Any, verl: VerlView) -> Several:
        name = chosen_loss(verl)
        if name not in CLIPPED:
            raise NothingToSet(f"the policy loss {name} has no such bound")
        if value is None:
            value = verl.get(f"{ACTOR}.clip_ratio")
        return Several({f"{LOSS}.clip_{side}": value})

    return convert


def parameter(loss: str, ours: str) -> Convert:
    """Return the conversion of a parameter that only ``loss`` has."""

    def convert(value: Any, verl: VerlView) -> Several:
        if chosen_loss(verl) != loss:
            raise NothingToSet(f"the policy loss {chosen_loss(verl)} has no such parameter")
        return Several({f"{LOSS}.{ours}": value})

    return convert


def aggregation(value: Any, verl: VerlView) -> Several:
    """Return how token losses become one number, with the constant of seq-mean-token-sum-norm."""
    name = f"{OBJECTIVE}.aggregation"
    if chosen_loss(verl) in PER_SEQUENCE:
        return Several({f"{name}.name": "seq-mean-token-mean"})
    mode = str(verl.get(f"{ACTOR}.loss_agg_mode"))
    if mode not in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        raise NoEquivalent("verl has no such aggregation")
    found = Several({f"{name}.name": mode})
    if mode == "seq-mean-token-sum-norm":
        factor = verl.get(f"{ACTOR}.loss_scale_factor")
        found[f"{name}.max_length"] = verl.whole("data.max_response_length") if factor is None else factor
    return found


def scale_factor(value: Any, verl: VerlView) -> Several:
    """Return the aggregation, if its constant is used."""
    if value is None or verl.get(f"{ACTOR}.loss_agg_mode") != "seq-mean-token-sum-norm":
        raise NothingToSet("verl divides by it with loss_agg_mode=seq-mean-token-sum-norm only")
    return aggregation(value, verl)


def estimator(name: Any) -> str:
    """Return rlcore's KL estimator."""
    if str(name) not in ESTIMATORS:
        raise NoEquivalent(f"the KL estimators are {', '.join(sorted(set(ESTIMATORS.values())))}")
    return ESTIMATORS[str(name)]


def kl_loss(value: Any, verl: VerlView) -> Several:
    """Return the weight of the KL term, which is 0 without ``use_kl_loss``."""
    weight = verl.number(f"{ACTOR}.kl_loss_coef") if verl.flag(f"{ACTOR}.use_kl_loss") else 0.0
    return Several({f"{OBJECTIVE}.kl_loss.coeff": weight})


def kl_coefficient(value: Any, verl: VerlView) -> Several:
    """Return the weight of the KL term, where it is on."""
    _check_kl(verl)
    return kl_loss(value, verl)


def kl_estimator(value: Any, verl: VerlView) -> str:
    """Return the KL term's estimator, where it is on."""
    _check_kl(verl)
    return estimator(value)


def _check_kl(verl: VerlView) -> None:
    if not verl.flag(f"{ACTOR}.use_kl_loss"):
        raise NothingToSet("verl reads it with use_kl_loss=True only, which is False by default")


_MODE = f"{ACTOR}.policy_loss.loss_mode"
COVARIANCE_KEYS = tuple(
    without(
        f"{ACTOR}.policy_loss.{name}",
        f"the policy losses are {', '.join(sorted(LOSSES.values()))}",
        switch=_MODE,
        on=modes,
    )
    for name, modes in {
        "clip_cov_ratio": ("clip_cov",),
        "clip_cov_lb": ("clip_cov",),
        "clip_cov_ub": ("clip_cov",),
        "kl_cov_ratio": ("kl_cov",),
        "ppo_kl_coef": ("kl_cov",),
    }.items()
)
"""Parameters of the losses that clip, or penalise, tokens by their covariance with the advantage."""
