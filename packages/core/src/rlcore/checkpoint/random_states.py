"""The state of every random generator of a process, as tensors and plain text."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def collect() -> tuple[dict[str, torch.Tensor], str]:
    """States of torch (and CUDA where there is one) and NumPy, and as JSON those of Python and the rest of NumPy's."""
    numpy: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy
    states = {"random/torch": torch.get_rng_state(), "random/numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states, json.dumps({"python": random.getstate(), "numpy": [kind, position, has_gauss, cached]})


def restore(states: Mapping[str, torch.Tensor], text: str) -> None:
    """Set all generators to what `collect` returned."""
    plain = json.loads(text)
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, states["random/numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["random/torch"])
    if torch.cuda.is_available() and "random/cuda" in states:
        torch.cuda.set_rng_state(states["random/cuda"])
