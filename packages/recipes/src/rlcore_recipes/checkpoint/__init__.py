"""Checkpoints of a run: atomic, verified, rotating; in a folder or at a URL, written while training continues.

`CheckpointManager` is what the loop uses; `naming`, `manifest`, `storage` (with `folder` and `remote`), `retention`,
`engine_side` (what happens in the engines' processes) and `node_folder` are its parts.
"""

from rlcore_recipes.checkpoint.manager import Checkpoint, CheckpointManager
from rlcore_recipes.checkpoint.manifest import MANIFEST, STATE, RunState, verify

__all__ = ["MANIFEST", "STATE", "Checkpoint", "CheckpointManager", "RunState", "verify"]
