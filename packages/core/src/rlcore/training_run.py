"""`TrainingRun`: what a run left in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TrainingRun:
    """The results of a run.

    Attributes:
        out_dir: the folder of the run.
        complete: whether the last step was made; False after an interrupt or a crash.
        model_path: the trained model in Hugging Face format; None if it was not written (``trainer.save_hf=false``, or
            the run is not complete).
        checkpoints: folders or URLs of the checkpoints, the newest last.
        metrics: one row per step, with the columns ``step``, ``time`` (s since the epoch) and one per metric; null
            where a step has no such metric or it is not finite.
        rollouts: the completions that were logged, by step: text, score, parts of the reward and others; ``split`` is
            "train" (``trainer.log_rollouts``) or "validation" (``trainer.log_val_generations``).
        config: the resolved configuration as plain values.
    """

    out_dir: Path
    complete: bool
    model_path: Path | None
    checkpoints: list[str]
    metrics: pa.Table = field(repr=False)
    rollouts: pa.Table = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)


class TrainingInterrupted(KeyboardInterrupt):
    """A run ended early because of an interrupt, after the step under way and with a checkpoint.

    Attributes:
        run: what it left.
    """

    def __init__(self, message: str, run: TrainingRun) -> None:
        super().__init__(message)
        self.run = run
