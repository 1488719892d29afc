"""The model after a run: finding its checkpoints, and writing them as model folders."""
