"""Ready-made configurations of the recipe rm."""
