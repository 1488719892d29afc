"""Ready-made configurations of the recipe dpo."""
