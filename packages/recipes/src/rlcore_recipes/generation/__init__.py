"""Generate with models and checkpoints outside of a run: completions of prompts, and conversations."""
