"""``algorithm.*``: advantages, KL in the reward, filters, corrections."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.from_verl.keys.entries import (
    Convert,
    Key,
    NoEquivalent,
    NothingToSet,
    Several,
    already,
    already_if,
    key,
    unchanged,
    without,
)
from rlcore_recipes.from_verl.keys.losses import estimator, loss_mode
from rlcore_recipes.from_verl.values import flag, number, whole
from rlcore_recipes.from_verl.view import VerlView

ADVANTAGE = "algorithm.advantage"
ESTIMATORS = {
    "gae": "gae",
    "grpo": "grpo",
    "grpo_vectorized": "grpo",
    "grpo_passk": "pass_at_k",
    "reinforce_plus_plus": "reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
    "remax": "remax",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "opo": "opo",
    "gpg": "gpg",
}
"""rlcore's advantage estimators by verl's ``adv_estimator``."""

NO_LIMIT = 1000
KL = "algorithm.kl_in_reward"
CORRECTION = "actor.objective.correction"
ROLLOUT_CORRECTION = "algorithm.rollout_correction"


def advantage(value: Any, verl: VerlView) -> str:
    """Return the advantage estimator."""
    if str(value) not in ESTIMATORS:
        raise NoEquivalent(f"the advantage estimators are {', '.join(sorted(set(ESTIMATORS.values())))}")
    return ESTIMATORS[str(value)]


def parameter(ours: str, *estimators: str) -> Convert:
    """Return the conversion of a parameter that only some estimators have."""

    def convert(value: Any, verl: VerlView) -> Several:
        name = verl.get("algorithm.adv_estimator")
        if ESTIMATORS.get(str(name)) not in estimators:
            raise NothingToSet(f"adv_estimator={name} has no such parameter")
        return Several({f"{ADVANTAGE}.{ours}": value})

    return convert


def kl_in_reward(value: Any, verl: VerlView) -> Several:
    """Return the coefficient of the KL penalty on rewards; it is off without ``use_kl_in_reward``."""
    if not verl.flag("algorithm.use_kl_in_reward"):
        return Several({KL: None})
    return Several({f"{KL}.coeff": verl.number("algorithm.kl_ctrl.kl_coef")})


def in_reward(convert: Convert, *, adaptive: bool = False) -> Convert:
    """Return ``convert`` for a part of the KL penalty, which verl reads only where it is on, or adaptive."""

    def checked(value: Any, verl: VerlView) -> Any:
        if not verl.flag("algorithm.use_kl_in_reward"):
            raise NothingToSet("verl reads it with algorithm.use_kl_in_reward=True only, which is False by default")
        if adaptive and verl.get("algorithm.kl_ctrl.type") != "adaptive":
            raise NothingToSet("verl reads it with algorithm.kl_ctrl.type=adaptive only")
        return convert(value, verl)

    return checked


def kl_target(value: Any, verl: VerlView) -> Any:
    """Return the KL to reach, if β adapts."""
    return verl.number("algorithm.kl_ctrl.target_kl") if verl.get("algorithm.kl_ctrl.type") == "adaptive" else None


def filter_groups(value: Any, verl: VerlView) -> Several:
    """Return dynamic sampling, or its absence in the recipe dapo."""
    if not flag(value):
        raise NothingToSet("steps train on all groups")
    if verl.recipe != "dapo":
        raise NoEquivalent("dynamic sampling is part of the recipe dapo, which has no critic")
    name = "algorithm.dynamic_sampling"
    limit = whole(verl.get("algorithm.filter_groups.max_num_gen_batches") or 0, "max_num_gen_batches")
    return Several({f"{name}.filter": "nonzero-spread", f"{name}.max_generations": limit if limit > 0 else NO_LIMIT})


def filter_part(value: Any, verl: VerlView) -> Several:
    """Return dynamic sampling, of which ``value`` is a part."""
    if not verl.flag("algorithm.filter_groups.enable"):
        raise NothingToSet("verl reads it with algorithm.filter_groups.enable=True only")
    return filter_groups(True, verl)


def filter_metric(value: Any, verl: VerlView) -> Any:
    """Check the number whose spread decides; rlcore takes the score."""
    if not verl.flag("algorithm.filter_groups.enable"):
        raise NothingToSet("verl reads it with algorithm.filter_groups.enable=True only")
    if value in ("score", "reward", "seq_reward", None):
        raise NothingToSet("groups are kept whose scores differ")
    if value == "acc":
        raise NothingToSet("groups are kept whose scores differ; a score that follows from acc differs with it")
    raise NoEquivalent("groups are kept whose scores differ, before penalties")


def correction(value: Any, verl: VerlView) -> Several:
    """Return the importance weights between rollout and trainer."""
    level, rejection = (verl.get(f"{ROLLOUT_CORRECTION}.{name}") for name in ("rollout_is", "rollout_rs"))
    if level is not None:
        return _weights(str(level), verl.get(f"{ROLLOUT_CORRECTION}.rollout_is_threshold"))
    if rejection is not None:
        return _rejection(str(rejection), verl.get(f"{ROLLOUT_CORRECTION}.rollout_rs_threshold"))
    return Several({CORRECTION: None})


def _weights(level: str, threshold: Any) -> Several:
    if level not in ("token", "sequence"):
        raise NoEquivalent("the weight of a sample is per token or per sequence")
    low, high = _bounds(threshold, with_low=False)
    if low is None:
        return Several({f"{CORRECTION}.name": "tis", f"{CORRECTION}.cap": high, f"{CORRECTION}.level": level})
    if level == "token":
        return Several({f"{CORRECTION}.name": "icepop", f"{CORRECTION}.low": low, f"{CORRECTION}.high": high})
    return Several(
        {
            f"{CORRECTION}.name": "mis",
            f"{CORRECTION}.level": level,
            f"{CORRECTION}.low": low,
            f"{CORRECTION}.high": high,
        }
    )


_REJECTION = {
    "token_k1": "token",
    "seq_sum_k1": "sequence",
    "seq_mean_k1": "geometric",
    "token": "token",
    "sequence": "sequence",
    "geometric": "geometric",
}


def _rejection(mode: str, threshold: Any) -> Several:
    if mode not in _REJECTION:
        raise NoEquivalent("samples are dropped by the ratio per token, sequence or its geometric mean (…_k1)")
    low, high = _bounds(threshold, with_low=True)
    name = CORRECTION
    return Several(
        {
            f"{name}.name": "mis",
            f"{name}.level": _REJECTION[mode],
            f"{name}.low": low,
            f"{name}.high": high,
            f"{name}.weight": "one",
        }
    )


def _bounds(threshold: Any, *, with_low: bool) -> tuple[float | None, float]:
    """Return the bounds of ``0.5_2.0`` or ``2.0``, whose lower bound is absent or the reciprocal."""
    parts = str(2.0 if threshold is None else threshold).split("_")
    high = float(number(parts[-1], f"{ROLLOUT_CORRECTION}.rollout_is_threshold"))
    if len(parts) == 2:
        return float(number(parts[0], f"{ROLLOUT_CORRECTION}.rollout_is_threshold")), high
    return (1 / high if with_low else None), high


def is_part(value: Any, verl: VerlView) -> Several:
    """Return the correction, unless importance weights are off."""
    if verl.get(f"{ROLLOUT_CORRECTION}.rollout_is") is None:
        raise NothingToSet("rollout_is is null")
    return correction(value, verl)


def rs_part(value: Any, verl: VerlView) -> Several:
    """Return the rejection; together with importance weights it has no equivalent."""
    if verl.get(f"{ROLLOUT_CORRECTION}.rollout_rs") is None:
        raise NothingToSet("rollout_rs is null")
    if verl.get(f"{ROLLOUT_CORRECTION}.rollout_is") is not None:
        raise NoEquivalent("one correction at a time: this run has the importance weights of rollout_is")
    return correction(value, verl)


def imp_ratio_cap(value: Any, verl: VerlView) -> Several:
    """Return the truncated importance weights of verl 0.5, which a positive bound switches on."""
    cap = float(number(value, "tis_imp_ratio_cap"))
    if cap <= 0:
        raise NothingToSet("importance weights are off")
    return Several({f"{CORRECTION}.name": "tis", f"{CORRECTION}.cap": cap, f"{CORRECTION}.level": "token"})


def bypass(value: Any, verl: VerlView) -> str:
    """Return where old log-probs come from."""
    return "rollout" if flag(value) else "recompute"


def bypass_loss(value: Any, verl: VerlView) -> Several:
    """Return the policy loss of verl's bypass mode."""
    if not verl.flag(f"{ROLLOUT_CORRECTION}.bypass_mode"):
        raise NothingToSet("verl reads it with bypass_mode=True only")
    return loss_mode(value, verl)


_SAMPLING = ("algorithm.dynamic_sampling.filter", "algorithm.dynamic_sampling.max_generations")
_CORRECTION = tuple(f"{CORRECTION}.{name}" for name in ("name", "cap", "level", "low", "high", "weight"))
_ONLY_ON = "with use_kl_in_reward only"

KEYS: tuple[Key, ...] = (
    key(
        "algorithm.adv_estimator",
        f"{ADVANTAGE}.name",
        advantage,
        differs="gae",
        meaning="gae: recipe ppo; others: grpo or dapo",
    ),
    key("algorithm.gamma", f"{ADVANTAGE}.gamma", parameter("gamma", "gae", "reinforce_plus_plus"), differs=1.0),
    key("algorithm.lam", f"{ADVANTAGE}.lam", parameter("lam", "gae"), differs=1.0),
    key(
        "algorithm.norm_adv_by_std_in_grpo",
        f"{ADVANTAGE}.normalize_std",
        parameter("normalize_std", "grpo", "pass_at_k"),
        differs=True,
    ),
    key("algorithm.use_kl_in_reward", (f"{KL}.coeff", KL), kl_in_reward, differs=False, meaning="False: null"),
    key(
        "algorithm.kl_penalty",
        f"{KL}.estimator",
        in_reward(lambda value, verl: estimator(value)),
        differs="kl",
        meaning=f"kl: k1; {_ONLY_ON}",
    ),
    key(
        "algorithm.kl_ctrl.kl_coef",
        f"{KL}.coeff",
        in_reward(kl_in_reward),
        default=0.001,
        old=("critic.kl_ctrl.kl_coef",),
        meaning=_ONLY_ON,
    ),
    key(
        "algorithm.kl_ctrl.type",
        f"{KL}.target",
        in_reward(kl_target),
        default="fixed",
        meaning="fixed: null",
        old=("critic.kl_ctrl.type",),
    ),
    key(
        "algorithm.kl_ctrl.target_kl",
        f"{KL}.target",
        in_reward(unchanged, adaptive=True),
        default=0.1,
        meaning="with type=adaptive only",
    ),
    key(
        "algorithm.kl_ctrl.horizon",
        f"{KL}.horizon",
        in_reward(unchanged, adaptive=True),
        differs=10000,
        meaning="with type=adaptive only",
    ),
    key("algorithm.filter_groups.enable", _SAMPLING, filter_groups, default=False, meaning="recipe dapo"),
    key("algorithm.filter_groups.max_num_gen_batches", _SAMPLING[1], filter_part, default=0, meaning=f"0: {NO_LIMIT}"),
    key("algorithm.filter_groups.metric", _SAMPLING[0], filter_metric, meaning="the score"),
    already("algorithm.filter_groups.max_inflight_gen_batches", "dropped groups are replaced one by one"),
    key(
        f"{ROLLOUT_CORRECTION}.rollout_is",
        _CORRECTION,
        is_part,
        old=("algorithm.rollout_is_level",),
        meaning="a threshold: tis; lower_upper: icepop or mis",
    ),
    key(
        f"{ROLLOUT_CORRECTION}.rollout_is_threshold",
        _CORRECTION,
        is_part,
        default=2.0,
        old=("algorithm.rollout_is_threshold",),
    ),
    key(f"{ROLLOUT_CORRECTION}.rollout_rs", _CORRECTION, rs_part, meaning="mis with weight one"),
    key(f"{ROLLOUT_CORRECTION}.rollout_rs_threshold", _CORRECTION, rs_part),
    key(f"{ROLLOUT_CORRECTION}.bypass_mode", "actor.old_logprobs", bypass, default=False, meaning="True: rollout"),
    key(f"{ROLLOUT_CORRECTION}.loss_type", "actor.objective.policy_loss.name", bypass_loss, default="ppo_clip"),
    already_if(
        f"{ROLLOUT_CORRECTION}.rollout_is_batch_normalize",
        (False, None),
        "weights are not normalised",
        "importance weights are not normalised over the batch",
    ),
    key("actor_rollout_ref.actor.tis_imp_ratio_cap", _CORRECTION[:3], imp_ratio_cap, meaning="tis per token; -1: off"),
    already_if(
        "algorithm.rollout_is",
        (True,),
        "the weights are those of rollout_is_level and rollout_is_threshold",
        "without weights there is no correction: actor.objective.correction=null",
    ),
    without("algorithm.rollout_is_mode", "tis truncates weights, mis and icepop drop samples"),
    without("algorithm.rollout_is_threshold_lower", "bounds are low and high of mis and icepop"),
    without("algorithm.rollout_is_veto_threshold", "a single token does not drop its sequence; mis drops by level"),
    already(f"{ROLLOUT_CORRECTION}.debug_rollout_actor_probs", "the mismatch is always measured: actor/rollout_kl"),
    already_if("algorithm.use_pf_ppo", (False,), "samples are not reweighted", "PF-PPO is not supported"),
    without("algorithm.pf_ppo.*", "PF-PPO is not supported", switch="algorithm.use_pf_ppo"),
)
