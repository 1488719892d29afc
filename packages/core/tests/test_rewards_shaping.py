"""Where scores stand in the token rewards, and DAPO's punishment of over-long answers."""

from __future__ import annotations

import random

import pytest
import torch

from rlcore.algorithms.shaping import OverlongSettings, overlong_punishment, terminal_rewards
from rlcore.batch import Batch, Jagged


@pytest.mark.parametrize("seed", range(20))
def test_score_stands_at_the_last_trained_token(seed: int) -> None:
    rng = random.Random(seed)
    lengths = torch.tensor([rng.choice([0, 1, 2, 6]) for _ in range(5)])
    mask = torch.tensor([rng.random() < 0.5 for _ in range(int(lengths.sum()))])
    scores = torch.tensor([rng.gauss(0, 1) for _ in lengths])
    batch = Batch({"loss_mask": Jagged(mask.long(), lengths)})
    expected = []
    for length, flags, score in zip(lengths.tolist(), mask.split(lengths.tolist()), scores.tolist()):
        row = [0.0] * length
        trained = [t for t in range(1, length) if flags[t]]
        if length:
            row[trained[-1] if trained else length - 1] = score
        expected += row
    actual = terminal_rewards(batch, scores)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=0)


def test_overlong_punishment() -> None:
    lengths = torch.tensor([1, 80, 81, 90, 100])
    actual = overlong_punishment(lengths, 100, OverlongSettings(buffer=20, factor=0.5))
    torch.testing.assert_close(actual, torch.tensor([0.0, 0.0, -0.025, -0.25, -0.5]))
