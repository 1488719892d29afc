"""A reward of your own: partial credit for numbers that are close.

    rlcore run grpo --config tiny.yaml reward.path=custom_reward.py:compute_score trainer.out_dir=runs/custom-reward

It runs in worker processes: an exception or an endless loop costs its sample the score, never the run.
"""

import re


def compute_score(solution_str, ground_truth):
    """1 for the right last number, the less the farther off it is, 0 without a number."""
    numbers = re.findall(r"-?\d{1,18}", solution_str)
    if not numbers:
        return {"score": 0.0, "answered": 0.0}
    error = abs(int(numbers[-1]) - int(ground_truth))
    # `answered` becomes a metric; `answer` is what validation votes with
    return {"score": 1 / (1 + error), "answered": 1.0, "answer": numbers[-1]}
