"""SGLang for rlcore: the rollout engine ``sglang``."""
