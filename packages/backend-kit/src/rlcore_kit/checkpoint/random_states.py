"""Collect and restore the state of every random generator of a process, as tensors and plain text."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rlcore.boundary import boundary
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint import json_file
from rlcore_kit.checkpoint.json_file import Count, Finite, JsonFile


class PlainStates(JsonFile):
    """The states that are stored as text: Python's generator, and NumPy's without its key."""

    python: tuple[Count, tuple[Count, ...], Finite | None] = Field(description="State of `random.getstate`.")
    numpy: tuple[str, Count, Count, Finite] = Field(description="Kind, position, and the cached normal number.")


@dataclass(frozen=True)
class RandomStates:
    """Complete states, as `checked` returns them."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None


def collect() -> tuple[dict[str, Tensor], str]:
    """Return the states of torch, of CUDA if available, and of NumPy's key as tensors, and the others as JSON text."""
    numpy: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy
    states = {"random/torch": torch.get_rng_state(), "random/numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    plain = PlainStates(python=random.getstate(), numpy=(kind, position, has_gauss, cached))
    return states, plain.encoded().decode()


def checked(states: Mapping[str, Tensor], text: str, where: str) -> RandomStates:
    """Check states that `collect` returned and that were read from the file ``where``.

    Raises:
        CheckpointError: a generator does not accept its state.
    """
    plain = json_file.parse(text, PlainStates, f"{where}, random states")
    kind, position, has_gauss, cached = plain.numpy
    with boundary(f"{where} is damaged: random states", CheckpointError):
        keys = states["random/numpy"].numpy()
        if keys.min() < 0:
            raise ValueError("a key of NumPy's generator is negative")
        numpy = (kind, keys.astype(np.uint32), position, has_gauss, cached)
        # unused generators validate the states before any generator of the process is changed
        random.Random().setstate(plain.python)
        np.random.RandomState().set_state(numpy)
        torch.Generator().set_state(states["random/torch"])
        cuda = states.get("random/cuda") if torch.cuda.is_available() else None
        if cuda is not None:
            torch.Generator("cuda").set_state(cuda)
    return RandomStates(plain.python, numpy, states["random/torch"], cuda)


def restore(states: RandomStates) -> None:
    """Set all generators of the process to ``states``."""
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch)
    if states.cuda is not None:
        torch.cuda.set_rng_state(states.cuda)
