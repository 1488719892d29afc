"""``rlcore quickstart``: a small model from scratch, first by SFT, then by GRPO, on this machine."""
