"""Configuration: typed models, YAML and overrides, all problems reported together."""

from rlcore.config.algorithm import Algorithm, AlgorithmField
from rlcore.config.base import Config, ForeignKey, ShortForm
from rlcore.config.load import dump_config, load_config, validate_config
from rlcore.config.requirements import missing_packages
from rlcore.config.sections import PluginName, PluginSections
from rlcore.config.values import FileName, FilePath, Seconds, Unlimited
from rlcore.packages import Package

__all__ = [
    "Algorithm",
    "AlgorithmField",
    "Config",
    "FileName",
    "FilePath",
    "ForeignKey",
    "Package",
    "PluginName",
    "PluginSections",
    "Seconds",
    "ShortForm",
    "Unlimited",
    "dump_config",
    "load_config",
    "missing_packages",
    "validate_config",
]
