"""The `inline` rollout engine: generation with the training weights themselves."""
