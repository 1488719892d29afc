"""NeMo Gym: tasks, tools and verifiers on resources servers, over its HTTP protocol."""
