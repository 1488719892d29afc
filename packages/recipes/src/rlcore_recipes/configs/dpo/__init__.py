"""Ready-made configurations of the recipe sft."""
