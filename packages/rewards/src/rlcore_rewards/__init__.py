"""rlcore-rewards."""
