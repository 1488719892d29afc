"""Configuration of the trainers: every key, its default and its meaning in one place."""

from rlcore_recipes.settings.algorithm import AlgorithmSettings, DynamicSamplingSettings
from rlcore_recipes.settings.asynchronous import AsyncSettings
from rlcore_recipes.settings.controller import ControllerSettings
from rlcore_recipes.settings.reinforcement import RLConfig
from rlcore_recipes.settings.roles import (
    ActorSettings,
    CriticSettings,
    ModelRole,
    RefSettings,
    RewardModelSettings,
    RewardRole,
    RolloutSettings,
    ValidationSampling,
)
from rlcore_recipes.settings.trainer import TrainerSettings

__all__ = [
    "ActorSettings",
    "AlgorithmSettings",
    "AsyncSettings",
    "ControllerSettings",
    "CriticSettings",
    "DynamicSamplingSettings",
    "ModelRole",
    "RLConfig",
    "RefSettings",
    "RewardModelSettings",
    "RewardRole",
    "RolloutSettings",
    "TrainerSettings",
    "ValidationSampling",
]
