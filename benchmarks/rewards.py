"""How many samples per second each reward scores, and how long its worker takes to start.

    uv run python benchmarks/rewards.py --workers 2

Every reward scores the same number of typical completions (about 600 characters) in batches; reported is the median
over the batches. `gsm8k` runs in the trainer's process, the others in the pool: `function` is a function that does
nothing, so its figure is what the pool itself costs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rlcore import plugins
from rlcore.engines.reward import RewardSample
from rlcore.engines.settings import RewardSettings

REASONING = "First we add the two numbers, which gives 12 + 30 = 42 apples, and take away 7 of them. " * 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="samples in a batch")
    parser.add_argument("--batches", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nothing.py"
        file.write_text("def compute_score(solution_str, ground_truth): return 0.0\n")
        print(f"{'reward':<10}{'samples/s':>12}{'µs/sample':>12}{'start, s':>10}")
        for name, options in (("gsm8k", {}), ("function", {"path": f"{file}:compute_score"}), ("math", {})):
            started, rate = measure(name, options, arguments)
            print(f"{name:<10}{rate:>12,.0f}{1e6 / rate:>12,.0f}{started:>10.2f}")


def measure(name: str, options: dict[str, str], arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds to build the reward, and samples per second."""
    plugin = plugins.get("rlcore.rewards", name)
    config = plugin.config_class().model_validate(options)
    before = time.perf_counter()
    reward = plugin.build(config, RewardSettings(workers=arguments.workers))
    started = time.perf_counter() - before
    try:
        reward.score_batch(batch(arguments.samples, -1))  # starts the other workers
        rates = []
        for number in range(arguments.batches):
            samples = batch(arguments.samples, number)
            before = time.perf_counter()
            reward.score_batch(samples)
            rates.append(arguments.samples / (time.perf_counter() - before))
        assert reward.stats()["errors"] == 0, reward.stats()
    finally:
        reward.close()
    return started, statistics.median(rates)


def batch(size: int, number: int) -> list[RewardSample]:
    """Samples whose answers are their own, so that no cache of math-verify knows them."""
    values = range(number * size, (number + 1) * size)
    return [RewardSample([], f"{REASONING}\n$\\boxed{{\\frac{{{v}}}{{7}}}}$\n#### {v}", str(v)) for v in values]


if __name__ == "__main__":
    main()
