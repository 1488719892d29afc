"""rlcore: reinforcement-learning post-training of large language models.

Importing this package loads nothing heavy: the names below are resolved on first use, so that the command line,
configuration checks and plugin listings never pay for torch, transformers or a backend.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("rlcore")

if TYPE_CHECKING:
    from rlcore.batch import Batch, Jagged
    from rlcore.engines import Reward, RolloutEngine, TrainEngine
    from rlcore.launch import open_run, train
    from rlcore.training_run import TrainingInterrupted, TrainingRun

_HOMES = {
    "Batch": "rlcore.batch",
    "Jagged": "rlcore.batch",
    "TrainEngine": "rlcore.engines",
    "RolloutEngine": "rlcore.engines",
    "Reward": "rlcore.engines",
    "train": "rlcore.launch",
    "open_run": "rlcore.launch",
    "TrainingRun": "rlcore.training_run",
    "TrainingInterrupted": "rlcore.training_run",
}

__all__ = [
    "Batch",
    "Jagged",
    "Reward",
    "RolloutEngine",
    "TrainEngine",
    "TrainingInterrupted",
    "TrainingRun",
    "__version__",
    "open_run",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rlcore' has no attribute {name!r}")
