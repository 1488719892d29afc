"""Configuration: typed models, YAML and overrides, errors all at once."""

from rlcore.config.base import Config
from rlcore.config.choice import Choice, Chosen
from rlcore.config.load import dump_config, load_config, validate_config
from rlcore.config.sections import PluginSections

__all__ = ["Choice", "Chosen", "Config", "PluginSections", "dump_config", "load_config", "validate_config"]
