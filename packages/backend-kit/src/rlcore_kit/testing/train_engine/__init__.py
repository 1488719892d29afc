"""Conformance suite for training engines.

A backend's test module holds::

    class TestMyEngine(TrainEngineConformance):
        def make_engine(self, spec):
            return build(dataclasses.replace(spec, options=MySettings(...)))

pytest then checks the contract of `rlcore.engines.TrainEngine` on tiny random models, against plain transformers and
plain torch. Engines must compute in fp32 here (or the suite's tolerances be raised).
"""

from rlcore_kit.testing.train_engine.batches import (
    LENGTHS,
    exported,
    make_batch,
    make_branching,
    make_pairs,
    reference_outputs,
)
from rlcore_kit.testing.train_engine.checkpoints import CheckpointTests
from rlcore_kit.testing.train_engine.comparisons import ComparisonTests, SumOf
from rlcore_kit.testing.train_engine.forward import ForwardTests
from rlcore_kit.testing.train_engine.heads import HeadTests
from rlcore_kit.testing.train_engine.model_folders import ModelFolderTests
from rlcore_kit.testing.train_engine.objectives import BreaksOff, PairMargin, SquaredError, WeightedLogprobs
from rlcore_kit.testing.train_engine.steps import StepTests
from rlcore_kit.testing.train_engine.weights import WeightTests


class TrainEngineConformance(
    ForwardTests, ComparisonTests, StepTests, HeadTests, WeightTests, ModelFolderTests, CheckpointTests
):
    """Subclass it, name the subclass ``Test…`` and implement `make_engine`."""


__all__ = [
    "LENGTHS",
    "BreaksOff",
    "CheckpointTests",
    "PairMargin",
    "SquaredError",
    "SumOf",
    "TrainEngineConformance",
    "WeightedLogprobs",
    "exported",
    "make_batch",
    "make_branching",
    "make_pairs",
    "reference_outputs",
]
