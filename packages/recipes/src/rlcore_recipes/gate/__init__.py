"""``rlcore-gate``: tiny tasks that learn in seconds, and the test whether a change hurts learning."""
