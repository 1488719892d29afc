"""Rollout serving: replicas behind one engine, and clients of inference servers."""
