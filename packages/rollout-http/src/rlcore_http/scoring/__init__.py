"""Log-probs of given tokens from running servers: the scoring engine ``http``."""
