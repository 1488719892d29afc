"""Evaluate models on prompts with a reward: pass@k, mean@k, maj@k with confidence intervals, and paired differences."""
