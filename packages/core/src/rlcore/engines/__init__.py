"""The interfaces that backends implement; each states its whole contract."""

from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine, SamplingParams
from rlcore.engines.settings import ModelSettings, OptimSettings, RewardSettings, RolloutSpec, TrainEngineSpec
from rlcore.engines.train import ForwardRequest, Objective, TrainEngine
from rlcore.engines.weight_sync import WeightBucket, sync_weights

__all__ = [
    "Completion",
    "ForwardRequest",
    "GenerationRequest",
    "ModelSettings",
    "Objective",
    "OptimSettings",
    "Reward",
    "RewardResult",
    "RewardSample",
    "RewardSettings",
    "RolloutEngine",
    "RolloutSpec",
    "SamplingParams",
    "TrainEngine",
    "TrainEngineSpec",
    "WeightBucket",
    "sync_weights",
]
