"""vLLM for rlcore: the rollout engine ``vllm``."""
