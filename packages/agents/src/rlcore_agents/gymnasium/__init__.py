"""Text environments with gymnasium's interface."""
