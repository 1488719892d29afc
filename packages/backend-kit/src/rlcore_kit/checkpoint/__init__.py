"""What training engines' checkpoints have in common: files that ranks write side by side, while training goes on."""
