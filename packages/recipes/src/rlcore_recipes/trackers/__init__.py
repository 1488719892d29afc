"""Trackers: where metrics and tables go."""

from rlcore_recipes.trackers.fanout import Trackers, open_trackers, show_histograms

__all__ = ["Trackers", "open_trackers", "show_histograms"]
