"""Environments and agents of the package `verifiers`, whose model calls a rollout engine answers."""
