"""Two-player text games: a registry, perfect play, and the episodes of self-play."""
