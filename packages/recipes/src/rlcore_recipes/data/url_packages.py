"""The packages behind the protocols of URLs. Imports fsspec's table of them only."""

from __future__ import annotations

from rlcore.packages import Package

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def package_of(url: str) -> Package | None:
    """Return the package by which fsspec reaches ``url``; None for a path or an unknown protocol."""
    protocol, separator, _ = url.partition("://")
    if not separator:
        return None
    from fsspec.registry import known_implementations

    known = known_implementations.get(protocol)
    if known is None:
        return None
    module = known["class"].rpartition(".")[0]
    extra = _EXTRAS.get(protocol)
    return Package(module, f"rlcore-recipes[{extra}]" if extra else module.partition(".")[0])
