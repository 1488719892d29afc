"""Pairs of completions: which samples take part."""

import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import RewardResult
from rlcore_recipes.settings.online_preference import PairAlgorithmSettings
from rlcore_recipes.step.pairs import compared, demonstrated


def batch(scores: list[float], failed: set[int], empty: set[int]) -> Batch:
    """Two groups of three completions."""
    lengths = torch.tensor([1 if row in empty else 4 for row in range(6)])
    mask = torch.cat([torch.tensor([0.0] + [1.0] * (size - 1)) for size in lengths.tolist()])
    return Batch(
        {
            "loss_mask": Jagged(mask, lengths),
            "score": torch.tensor(scores),
            "group": torch.tensor([4, 4, 4, 9, 9, 9]),
            "response_length": lengths - 1,
            "reward_result": [
                RewardResult(score, error="timeout" if row in failed else None) for row, score in enumerate(scores)
            ],
        }
    )


def test_failed_and_empty_completions_are_in_no_pair() -> None:
    data = batch([0.0, 1.0, 0.5, 0.0, 0.2, 1.0], failed={0, 3}, empty={5})
    _, rows, margins, metrics = compared(data, PairAlgorithmSettings(), 8)
    assert rows.tolist() == [[1, 2]]
    assert margins.tolist() == [0.5]
    assert metrics.to_dict() == {"pairs/count": 1, "pairs/prompts": 0.5, "pairs/score_gap": 0.5}


def test_the_punishment_of_length_decides_too() -> None:
    data = batch([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], failed=set(), empty=set())
    short = data.with_columns(response_length=torch.tensor([3, 8, 3, 3, 3, 3]))
    settings = PairAlgorithmSettings.model_validate({"overlong": {"buffer": 4}})
    rewards, rows, margins, _ = compared(short, settings, 8)
    assert rows.tolist() == [[0, 1]]
    assert margins.tolist() == [1.0]
    assert float(rewards.flat("token_rewards").sum()) == 5.0


def test_no_pair_is_no_error() -> None:
    _, rows, _, metrics = compared(batch([1.0] * 6, failed=set(), empty=set()), PairAlgorithmSettings(), 8)
    assert rows.shape == (0, 2)
    assert metrics.to_dict() == {"pairs/count": 0, "pairs/prompts": 0}


def test_each_completion_is_compared_with_the_demonstration_of_its_prompt() -> None:
    data = batch([0.0] * 6, failed=set(), empty={4})
    tokens = torch.arange(data.total_tokens)
    tokens[4:8] = tokens[:4]  # the second completion of the first prompt is the demonstration
    reasons = ["given", "stop", "stop", "stop", "length", "given"]
    data = data.with_columns(tokens=data.jagged(tokens), finish_reason=reasons)
    _, rows, sampled, metrics = demonstrated(data)
    assert rows.tolist() == [[0, 2], [5, 3]]
    assert sampled.tolist() == [1, 2, 3, 4]
    assert metrics.to_dict() == {"pairs/count": 2, "pairs/equal": 1}
