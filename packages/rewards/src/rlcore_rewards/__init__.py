"""Rewards for rlcore, and the pool of worker processes that runs reward functions."""
