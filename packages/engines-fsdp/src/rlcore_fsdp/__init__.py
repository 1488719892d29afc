"""rlcore-engines-fsdp."""
