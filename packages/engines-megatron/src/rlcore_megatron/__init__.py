"""Megatron-core for rlcore: the training engine ``megatron``."""
