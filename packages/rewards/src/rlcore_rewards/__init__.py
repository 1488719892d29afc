"""Rewards for rlcore, and the pool of worker processes that functions run in."""
