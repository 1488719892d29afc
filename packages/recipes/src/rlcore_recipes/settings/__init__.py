"""Configuration of the trainers: every key, its default and its meaning in one place."""

from rlcore_recipes.settings.algorithm import AlgorithmSettings
from rlcore_recipes.settings.reinforcement import RLConfig
from rlcore_recipes.settings.roles import (
    ActorSettings,
    CriticSettings,
    ModelRole,
    RefSettings,
    RewardRole,
    RolloutSettings,
    ValidationSampling,
)
from rlcore_recipes.settings.trainer import ControllerSettings, TrainerSettings

__all__ = [
    "ActorSettings",
    "AlgorithmSettings",
    "ControllerSettings",
    "CriticSettings",
    "ModelRole",
    "RLConfig",
    "RefSettings",
    "RewardRole",
    "RolloutSettings",
    "TrainerSettings",
    "ValidationSampling",
]
