"""The device of an engine."""

from __future__ import annotations

import os

import torch

from rlcore.errors import EngineError


def choose_device(requested: str | None) -> torch.device:
    """Return the CPU or the CUDA device of ``LOCAL_RANK``; without a request, CUDA if there is one.

    Raises:
        EngineError: there is no such device.
    """
    kind = requested or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EngineError("device is cuda but torch finds no CUDA device here; set device to cpu or null")
    index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise EngineError(f"LOCAL_RANK is {index} but only {torch.cuda.device_count()} CUDA devices are visible")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
