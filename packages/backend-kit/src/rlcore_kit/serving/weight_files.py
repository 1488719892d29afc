"""Weights written to a folder that a server reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from rlcore.engines.weight_bucket import WeightBucket


def write_weights(parent: Path, url: str, buckets: Iterable[WeightBucket]) -> Path:
    """Write one safetensors file per bucket to a folder of the server at ``url`` below ``parent``; return the folder.

    Files of an earlier update are removed.
    """
    name = url.partition("://")[2]
    folder = parent / "".join(letter if letter.isalnum() else "-" for letter in name)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for index, bucket in enumerate(buckets):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket.tensors}
        save_file(tensors, folder / f"model-{index:05d}.safetensors")
    return folder.resolve()
