"""Ready-made configurations of the recipe dapo."""
