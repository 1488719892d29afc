"""rlcore-engines-megatron."""
