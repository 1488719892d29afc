"""Ready-made configurations of the recipe grpo."""
