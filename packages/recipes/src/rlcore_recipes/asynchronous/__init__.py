"""Asynchronous training: rollout processes generate for the next steps while this one trains.

`schedule` decides what may be started and taken, `producer` does it, `prompts` knows what a resumed run must see again.
"""

from rlcore_recipes.asynchronous.producer import Producer, open_producer
from rlcore_recipes.asynchronous.prompts import PromptQueue
from rlcore_recipes.asynchronous.schedule import Schedule

__all__ = ["Producer", "PromptQueue", "Schedule", "open_producer"]
