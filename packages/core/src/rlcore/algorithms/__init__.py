"""Algorithms as pure functions in registries.

`advantages`, `policy_losses`, `kl_estimators` and `aggregations` hold them by name; `objectives` composes them into the
losses that training engines call. Importing this package registers the built-in ones.
"""
