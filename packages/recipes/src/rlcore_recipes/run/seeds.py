"""Random numbers as a function of what they are for."""

from __future__ import annotations

import hashlib
import os
import random


def sample_seed(seed: int, purpose: str, position: int, sample: int) -> int:
    """Return the seed of one completion, 63 bits: a function of what is sampled, not of what runs at the same time."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(seed: int, step: int) -> None:
    """Seed Python's, NumPy's and torch's global generators as a function of (seed, step, rank).

    Called before every step: so their states need no saving, and a resumed run, on as many processes as it likes, draws
    what the undisturbed one would have drawn.
    """
    import numpy as np
    import torch

    derived = random.Random(f"{seed}/{step}/{os.environ.get('RANK', 0)}").getrandbits(32)
    random.seed(derived)
    np.random.seed(derived)
    torch.manual_seed(derived)
