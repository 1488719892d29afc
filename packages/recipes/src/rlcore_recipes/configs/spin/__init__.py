"""Ready-made configurations of the recipe spin."""
