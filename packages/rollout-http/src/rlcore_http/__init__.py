"""Running inference servers for rlcore, by URL: the rollout engine ``http``."""
