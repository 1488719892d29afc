"""Distillation: teachers, the contexts in which they see completions, and the student's update."""
