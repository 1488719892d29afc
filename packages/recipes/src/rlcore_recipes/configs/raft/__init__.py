"""Ready-made configurations of the recipe raft."""
