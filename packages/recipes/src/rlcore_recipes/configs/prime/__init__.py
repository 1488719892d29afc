"""Ready-made configurations of the recipe prime."""
