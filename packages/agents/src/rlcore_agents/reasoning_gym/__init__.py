"""reasoning-gym: its generators of problems as data sets, and its scorers as a reward."""
