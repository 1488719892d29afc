"""Training from Python: a data set, two rewards and a run, without files in between.

python train_from_python.py
"""

from pathlib import Path

import rlcore


def near(solution_str, ground_truth, **columns):
    """Score 1 for the right number at the end, less the further away it is."""
    try:
        return 1 / (1 + abs(float(solution_str.split()[-1]) - float(ground_truth)))
    except (IndexError, ValueError):  # no number
        return 0.0


def at_most(length):
    """Return a reward that falls with what a completion has over ``length`` characters."""

    def short(solution_str, **columns):
        return -max(len(solution_str) - length, 0) / length

    return short


def main():
    """Train, and read the results from the folder of the run."""
    sums = [{"prompt": f"{a} + {b} =", "ground_truth": str(a + b)} for a in range(10) for b in range(10)]
    folder = Path("runs/from-python")
    run = rlcore.train(
        "grpo",
        config="tiny.yaml",  # model and sizes
        data=sums,
        val_data=sums[:8],
        reward=[near, (at_most(20), 0.1)],
        out_dir=folder,
    )
    assert run.complete
    print(rlcore.open_run(folder).metrics.select(["step", "critic/score/mean", "reward/near/score"]).to_pylist())
    print(f"the model is in {run.model_path}")


if __name__ == "__main__":  # engines in other processes import this file
    main()
