"""``*.optim.*``: optimizer and schedule of one role, for FSDP and Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlcore_recipes.from_verl.keys.entries import Key, NoEquivalent, NothingToSet, already, already_if, key, without
from rlcore_recipes.from_verl.values import number, whole
from rlcore_recipes.from_verl.view import VerlView

MUON = ("muon", "adaptive_muon")
_OF_MUON = (
    "use_layer_wise_distributed_optimizer",
    "muon_momentum",
    "muon_nesterov",
    "muon_split_qkv",
    "muon_scale_mode",
    "muon_coefficient_type",
    "muon_num_ns_steps",
    "muon_tp_mode",
    "muon_fp32_matmul_prec",
    "muon_extra_scale_factor",
    "muon_scalar_optimizer",
)
SCHEDULES = {"constant": "constant", "cosine": "cosine", "linear": "linear"}


def schedule(value: Any, verl: VerlView) -> str:
    """Return the shape after the warm-up."""
    if value is None:
        raise NothingToSet("lr_scheduler_type decides")
    if value not in SCHEDULES:
        raise NoEquivalent(f"the schedules are {', '.join(SCHEDULES)}; this run has constant")
    return SCHEDULES[value]


def optional(value: Any, verl: VerlView) -> Any:
    """Return ``value``; nothing is to be set for null."""
    if value is None:
        raise NothingToSet("null leaves it to the run's length")
    return value


@dataclass(frozen=True)
class Optimizer:
    """Conversions that need several keys of one role's optimizer.

    Attributes:
        section: of verl, such as ``actor_rollout_ref.actor.optim``.
        role: ``actor`` or ``critic``.
    """

    section: str
    role: str

    def warmup(self, value: Any, verl: VerlView) -> int:
        """Return the optimizer steps of the warm-up; below 0 the share decides."""
        if value is None or whole(value, f"{self.section}.lr_warmup_steps") < 0:
            raise NothingToSet("lr_warmup_steps_ratio decides")
        return whole(value, f"{self.section}.lr_warmup_steps") * verl.updates(self.role)

    def warmup_share(self, value: Any, verl: VerlView) -> float:
        """Return the warm-up as a share of all steps, unless it is given in steps."""
        steps = verl.get(f"{self.section}.lr_warmup_steps")
        if steps is not None and whole(steps, f"{self.section}.lr_warmup_steps") >= 0:
            raise NothingToSet("lr_warmup_steps decides")
        return number(value or 0.0, f"{self.section}.lr_warmup_steps_ratio")

    def length(self, value: Any, verl: VerlView) -> int:
        """Return the optimizer steps of the schedule."""
        if value is None or whole(value, f"{self.section}.total_training_steps") <= 0:
            raise NothingToSet("the schedule has the run's length")
        return whole(value, f"{self.section}.total_training_steps") * verl.updates(self.role)

    def least(self, value: Any, verl: VerlView) -> float:
        """Return the final learning rate as a fraction of the peak."""
        peak = number(verl.get(f"{self.section}.lr"), f"{self.section}.lr")
        return number(value or 0.0, f"{self.section}.min_lr") / peak


COUNTED = "verl counts steps, rlcore optimizer steps: times the mini-batches and epochs of a step"


def optim_keys(
    section: str, role: str, lr: float, *, clip: tuple[str, ...] = (), warmup_ratio: float = 0.0
) -> tuple[Key, ...]:
    """Return the keys of an optimizer.

    Args:
        section: of verl, such as ``actor_rollout_ref.actor.optim``.
        role: its section in rlcore: ``actor`` or ``critic``.
        lr: verl's default.
        clip: further names of the maximum gradient norm.
        warmup_ratio: verl's default.
    """
    ours, by = f"{role}.optim", Optimizer(section, role)
    schedules = (f"{section}.warmup_style", f"{section}.lr_decay_style", f"{section}.lr_scheduler")
    return (
        key(f"{section}.lr", f"{ours}.lr", differs=lr),
        key(f"{section}.weight_decay", f"{ours}.weight_decay", differs=0.01),
        key(f"{section}.betas", f"{ours}.betas"),
        key(f"{section}.clip_grad", f"{ours}.clip_grad", optional, default=1.0, old=clip),
        key(f"{section}.lr_scheduler_type", f"{ours}.schedule", schedule, default="constant", old=schedules),
        key(f"{section}.lr_warmup_steps", f"{ours}.warmup_steps", by.warmup, default=-1, meaning=COUNTED),
        key(
            f"{section}.lr_warmup_steps_ratio",
            f"{ours}.warmup_ratio",
            by.warmup_share,
            default=warmup_ratio,
            old=(f"{section}.warmup_steps_ratio",),
        ),
        key(f"{section}.min_lr_ratio", f"{ours}.min_lr_ratio", optional),
        key(
            f"{section}.min_lr",
            f"{ours}.min_lr_ratio",
            by.least,
            old=(f"{section}.lr_min",),
            meaning="divided by the peak",
        ),
        key(
            f"{section}.lr_decay_steps",
            f"{ours}.total_steps",
            by.length,
            old=(f"{section}.total_training_steps",),
            meaning=COUNTED,
        ),
        *_adam_keys(section),
        key(
            f"{section}.override_optimizer_config.optimizer_cpu_offload",
            f"{role}.megatron.offload_optimizer",
            meaning="optimizer states stay in host memory between optimizer steps",
        ),
        key(f"{section}.override_optimizer_config.*", f"{role}.megatron.optimizer.*"),
    )


def _adam_keys(section: str) -> tuple[Key, ...]:
    """Return the keys for which there is nothing to set, or no equivalent."""
    cosine, near_zero, adam = "cosine falls once over the run", "the warm-up starts near 0", "the optimizer is AdamW"
    read = "the schedule is the configuration's"
    return (
        already_if(f"{section}.num_cycles", (0.5, None), cosine, cosine, default=0.5),
        already_if(f"{section}.lr_warmup_init", (0, 0.0, None), near_zero, near_zero),
        already_if(f"{section}.optimizer", ("AdamW", "adamw", "adam", "Adam", None), adam, f"{adam}, always"),
        already(f"{section}.optimizer_impl", "the optimizer is torch's AdamW"),
        already(f"{section}.zero_indexed_step", "the first step of a warm-up of N has 1/N of the peak, as with False"),
        already_if(f"{section}.use_checkpoint_opt_param_scheduler", (False,), read, read),
        without(f"{section}.weight_decay_incr_style", "weight decay is constant", off=("constant",)),
        *(
            without(
                f"{section}.{name}",
                "the schedules are constant, linear and cosine",
                switch=f"{section}.lr_scheduler_type",
                on=("wsd", "WSD"),
            )
            for name in ("lr_wsd_decay_style", "lr_wsd_decay_steps", "lr_wsd_stable_steps_ratio")
        ),
        *(without(f"{section}.{name}", f"{adam}, always", switch=f"{section}.optimizer", on=MUON) for name in _OF_MUON),
    )
