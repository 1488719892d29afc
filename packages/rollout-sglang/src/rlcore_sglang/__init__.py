"""rlcore-rollout-sglang."""
