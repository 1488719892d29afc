"""rlcore-rollout-vllm."""
