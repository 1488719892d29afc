"""OpenEnv: environments on servers, over its protocol."""
