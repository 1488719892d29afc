"""Configuration: typed models, YAML and overrides, errors all at once."""

from rlcore.config.base import Config
from rlcore.config.choice import Choice, Chosen, PluginSections

__all__ = ["Choice", "Chosen", "Config", "PluginSections"]
