"""Health checks: rewards that fail, updates that are skipped, steps longer than the grace period."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from warnings import warn

from rlcore.errors import RlcoreWarning, TrainingError
from rlcore_recipes.rollouts.invalid import Reasons
from rlcore_recipes.settings import TrainerSettings

WINDOW = 5
"""Steps over which the share of failed rewards is taken."""

SKIPPED = "/skipped_steps"


class Health:
    """Warns of what goes wrong in a step, and raises once it has gone wrong for too long.

    Args:
        max_error_ratio: share of samples whose reward may fail over `WINDOW` steps; 1 never ends the run.
        max_invalid_ratio: as ``max_error_ratio``, of invalid episodes.
        invalid: why episodes were invalid so far.
    """

    def __init__(
        self, trainer: TrainerSettings, max_error_ratio: float, max_invalid_ratio: float, invalid: Reasons
    ) -> None:
        self._trainer = trainer
        self._max_error_ratio = max_error_ratio
        self._max_invalid_ratio = max_invalid_ratio
        self._invalid = invalid
        self._error_ratios: deque[float] = deque(maxlen=WINDOW)
        self._invalid_ratios: deque[float] = deque(maxlen=WINDOW)
        self._steps = 0
        self._skipped = 0
        self._warned: set[str] = set()

    def check(self, metrics: Mapping[str, float], last: bool) -> None:
        """Look at a step's metrics.

        Args:
            last: it is the run's last step, at which shorter failures count too if they lasted for the whole run.

        Raises:
            TrainingError: rewards failed, episodes were invalid, or updates were skipped, for too long.
        """
        self._steps += 1
        self.check_validation(metrics)
        self._check_episodes(metrics, last)
        self._check_rewards(metrics, last)
        self._check_updates(metrics, last)
        self._check_duration(metrics)

    def check_validation(self, metrics: Mapping[str, float]) -> None:
        """Warn if the reward failed on too many samples of a validation."""
        ratio = metrics.get("val-aux/reward_error_ratio", 0.0)
        if ratio > self._max_error_ratio:
            self._warn("validation", f"the reward failed on {ratio:.0%} of the samples of a validation")

    def _check_episodes(self, metrics: Mapping[str, float], last: bool) -> None:
        if "rollout/invalid_ratio" not in metrics:
            return
        limit = self._max_invalid_ratio
        self._invalid_ratios.append(metrics["rollout/invalid_ratio"])
        mean = sum(self._invalid_ratios) / len(self._invalid_ratios)
        if mean > limit and (last or len(self._invalid_ratios) == WINDOW):
            reasons = "; ".join(f"{count} times: {reason}" for reason, count in self._invalid.most_common(3))
            raise TrainingError(
                f"{mean:.0%} of the episodes of the last {len(self._invalid_ratios)} steps were invalid, more than "
                f"rollout.environment.max_invalid_ratio={limit:g} ({reasons}). Correct the environment, or raise the "
                "limit (1: never)"
            )

    def _check_rewards(self, metrics: Mapping[str, float], last: bool) -> None:
        if "reward/error_ratio" not in metrics:
            return
        limit, ratio = self._max_error_ratio, metrics["reward/error_ratio"]
        self._error_ratios.append(ratio)
        mean = sum(self._error_ratios) / len(self._error_ratios)
        if mean > limit and (last or len(self._error_ratios) == WINDOW):
            raise TrainingError(
                f"the reward failed on {mean:.0%} of the samples of the last {len(self._error_ratios)} steps, more "
                f"than reward.max_error_ratio={limit:g}: they got reward.error_score, from which nothing can be "
                "learned. The first failure of each kind was logged with its reason (over Ray in out_dir/logs); "
                "correct the reward, or raise the limit (1: never)"
            )
        if ratio > limit:
            self._warn(
                "rewards",
                f"the reward failed on {ratio:.0%} of the samples of a step; the run ends if more than "
                f"reward.max_error_ratio={limit:g} of the samples fail over {WINDOW} steps",
            )

    def _check_updates(self, metrics: Mapping[str, float], last: bool) -> None:
        found = [name for name, value in metrics.items() if name.endswith(SKIPPED) and value > 0]
        self._skipped = self._skipped + 1 if found else 0
        limit = self._trainer.max_skipped_steps
        if not found or limit is None:
            return
        role = found[0].removesuffix(SKIPPED)
        if self._skipped >= limit or (last and self._skipped == self._steps):
            raise TrainingError(
                f"an update was skipped in each of the last {self._skipped} steps, because its gradient norm was not "
                f"finite ({role}; trainer.max_skipped_steps={limit}). Look for values that are not finite in the "
                "model, the data or the settings of the loss (learning rate, coefficients, dtype)"
            )
        self._warn(
            "updates",
            f"an update was skipped because its gradient norm is not finite ({role}); the run ends after "
            f"trainer.max_skipped_steps={limit} such steps in a row",
        )

    def _check_duration(self, metrics: Mapping[str, float]) -> None:
        grace = self._trainer.grace_s
        seconds = metrics.get("timing_s/step", 0.0) + metrics.get("timing_s/save_checkpoint", 0.0)
        if self._trainer.save_freq > 0 and seconds > grace:
            self._warn(
                "duration",
                f"a step and its checkpoint take {seconds:.0f} s, longer than trainer.grace_s={grace:g}: SIGTERM early "
                "in a step ends the run without a checkpoint of that step; raise trainer.grace_s, up to what the "
                "scheduler leaves",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn(message, RlcoreWarning, stacklevel=4)
