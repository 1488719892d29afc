"""The interfaces that backends implement; each states its whole contract.

Names are resolved on first use: a reward worker or a check of a configuration needs some of them and not torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlcore.engines.reward import Reward, RewardResult, RewardSample
    from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine, SamplingParams
    from rlcore.engines.scoring import ScoringEngine, ScoringRequest, ScoringSpec, TokenScores
    from rlcore.engines.settings import (
        ExportSpec,
        LoRASettings,
        ModelSettings,
        OptimSettings,
        RewardSettings,
        RolloutSpec,
        TrainEngineSpec,
        WeightSyncSettings,
    )
    from rlcore.engines.train import Comparison, ForwardRequest, Objective, OutputLayer, TrainEngine
    from rlcore.engines.weight_bucket import WeightBucket
    from rlcore.engines.weight_lender import WeightLender
    from rlcore.engines.weight_sync import sync_weights

_HOMES = {
    "Comparison": "train",
    "Completion": "rollout",
    "ExportSpec": "settings",
    "ForwardRequest": "train",
    "GenerationRequest": "rollout",
    "LoRASettings": "settings",
    "ModelSettings": "settings",
    "Objective": "train",
    "OptimSettings": "settings",
    "OutputLayer": "train",
    "Reward": "reward",
    "RewardResult": "reward",
    "RewardSample": "reward",
    "RewardSettings": "settings",
    "RolloutEngine": "rollout",
    "RolloutSpec": "settings",
    "SamplingParams": "rollout",
    "ScoringEngine": "scoring",
    "ScoringRequest": "scoring",
    "ScoringSpec": "scoring",
    "TokenScores": "scoring",
    "TrainEngine": "train",
    "TrainEngineSpec": "settings",
    "WeightBucket": "weight_bucket",
    "WeightLender": "weight_lender",
    "WeightSyncSettings": "settings",
    "sync_weights": "weight_sync",
}

__all__ = [
    "Comparison",
    "Completion",
    "ExportSpec",
    "ForwardRequest",
    "GenerationRequest",
    "LoRASettings",
    "ModelSettings",
    "Objective",
    "OptimSettings",
    "OutputLayer",
    "Reward",
    "RewardResult",
    "RewardSample",
    "RewardSettings",
    "RolloutEngine",
    "RolloutSpec",
    "SamplingParams",
    "ScoringEngine",
    "ScoringRequest",
    "ScoringSpec",
    "TokenScores",
    "TrainEngine",
    "TrainEngineSpec",
    "WeightBucket",
    "WeightLender",
    "WeightSyncSettings",
    "sync_weights",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rlcore.engines' has no attribute {name!r}")
