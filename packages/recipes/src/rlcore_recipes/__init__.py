"""rlcore-recipes."""
