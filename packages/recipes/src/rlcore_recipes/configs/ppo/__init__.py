"""Ready-made configurations of the recipe ppo."""
