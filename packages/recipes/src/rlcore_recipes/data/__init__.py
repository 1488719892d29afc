"""Data: reading prompts, resumable loading, and preparation of the standard sets.

`rlcore_recipes.data.settings` imports neither torch nor transformers.
"""
