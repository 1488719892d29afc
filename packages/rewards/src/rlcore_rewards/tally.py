"""Count samples and failures; log the first failure of every kind with its message."""

from __future__ import annotations

import logging
from collections import Counter
from threading import Lock

from rlcore.engines.reward import RewardResult

logger = logging.getLogger(__name__)


class Tally:
    """The counts of `rlcore.engines.reward.Reward.stats`, and the result of failed samples. Thread-safe."""

    def __init__(self, reward: str, error_score: float) -> None:
        self.reward = reward
        self.error_score = error_score
        self._samples = 0
        self._failures: Counter[str] = Counter()
        self._lock = Lock()

    def scored(self, result: RewardResult) -> RewardResult:
        """Count a scored sample and return its result."""
        with self._lock:
            self._samples += 1
        return result

    def failed(self, kind: str, message: str) -> RewardResult:
        """Count a failure and return the failed sample's result."""
        with self._lock:
            self._samples += 1
            self._failures[kind] += 1
            first = self._failures[kind] == 1
        logger.log(
            logging.WARNING if first else logging.DEBUG,
            "reward %s failed on a sample (%s), which gets %g%s: %s",
            self.reward,
            kind,
            self.error_score,
            "; further failures of this kind are only counted" if first else "",
            message,
        )
        return RewardResult(self.error_score, error=kind)

    def stats(self) -> dict[str, int]:
        """Return the number of ``samples``, of ``errors``, and of ``errors/<kind>`` for every kind."""
        with self._lock:
            kinds = {f"errors/{kind}": count for kind, count in sorted(self._failures.items())}
            return {"samples": self._samples, "errors": self._failures.total(), **kinds}
