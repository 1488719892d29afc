"""Train most on prompts that are seldom answered: a recipe with its own policy loss and advantage estimator."""
