"""Ready-made configurations, by recipe."""
