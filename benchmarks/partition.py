"""Token balance over ranks: `balanced_partitions` against verl's Karmarkar-Karp, and what it costs of a step.

    uv pip install --no-deps --target /tmp/verl verl==0.9.1 tensordict packaging codetiming hydra-core omegaconf \\
        antlr4-python3-runtime cloudpickle orjson pyvers importlib-metadata zipp
    uv run python benchmarks/partition.py balance --verl /tmp/verl
    uv run python benchmarks/partition.py step

``balance``: sequence lengths from heavy-tailed distributions, cut at 32,768 tokens. Both divide the same lists, in
turn, in one process; reported are medians over the draws of the time and of the imbalance, tokens of the fullest rank
over the mean minus 1. ``floor`` is the imbalance that no division can go below: that of the longest sequence alone.
verl (``get_seqlen_balanced_partitions``, ``equal_size=False``) makes an object for every sequence and rank, so it is
left out where these are more than ``--verl-cells``.

``step``: seconds to divide a batch by tokens and to copy out every rank's part, against the seconds of the step that
the batch belongs to, both measured: a whole GRPO step of ``grpo_step.py``, and an update on heavy-tailed sequences of
the same model (no generation, so the share is overstated). The model is tiny; a larger one makes the share smaller.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlcore.batch import Batch, Jagged, balanced_partitions
from rlcore.controller.dispatch import partition, take

CAP = 32_768
SIZES = [
    (512, (2, 8, 64)),
    (4_096, (8, 64, 512)),
    (16_384, (8, 64, 512)),
    (65_536, (8, 64, 512)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["balance", "step"])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--verl", type=Path, help="folder into which verl was installed")
    parser.add_argument("--verl-cells", type=int, default=4_200_000, help="largest sequences x ranks given to verl")
    parser.add_argument("--steps", type=int, default=5, help="timed steps and updates")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    {"balance": balance, "step": step}[arguments.what](arguments)


# --- balance ---------------------------------------------------------------------------------------------------------


def lognormal(n: int, draw: random.Random) -> list[int]:
    """Median 1,000 tokens, one in a hundred above 10,000."""
    return [max(1, min(int(draw.lognormvariate(6.9, 1.0)), CAP)) for _ in range(n)]


def pareto(n: int, draw: random.Random) -> list[int]:
    """At least 400 tokens with tail index 1.2: without the cut its variance would be infinite."""
    return [min(int(400 * draw.paretovariate(1.2)), CAP) for _ in range(n)]


def greedy(lengths: Sequence[int], parts: int) -> list[int]:
    """Tokens of each rank by longest-first greedy."""
    ranks = [0] * parts
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(ranks, ranks[0] + length)
    return ranks


def balance(arguments: argparse.Namespace) -> None:
    verl = load_verl(arguments.verl) if arguments.verl else None
    columns = ("lengths", "n", "ranks", "floor %", "ours %", "worst %", "verl %", "greedy %", "ours ms", "verl ms")
    print("".join(f"{column:>10}" for column in columns))
    for distribution in (lognormal, pareto):
        for n, ranks in SIZES:
            for parts in ranks:
                compared = verl if n * parts <= arguments.verl_cells else None
                row = compare(distribution, n, parts, arguments.draws, compared)
                print(
                    f"{distribution.__name__:>10}{n:>10}{parts:>10}" + "".join(f"{cell:>10}" for cell in row),
                    flush=True,
                )


def compare(
    distribution: Callable[[int, random.Random], list[int]],
    n: int,
    parts: int,
    draws: int,
    verl: Callable[..., list[list[int]]] | None,
) -> list[str]:
    floor, ours, theirs, simple, ours_ms, theirs_ms = [], [], [], [], [], []
    for seed in range(draws):
        lengths = distribution(n, random.Random(seed))
        mean = sum(lengths) / parts

        def imbalance(loads: Sequence[int], mean: float = mean) -> float:
            return 100 * (max(loads) / mean - 1)

        def loads(found: list[list[int]], lengths: list[int] = lengths) -> list[int]:
            return [sum(lengths[i] for i in part) for part in found]

        floor.append(max(0.0, imbalance([max(lengths)])))
        simple.append(imbalance(greedy(lengths, parts)))
        found, seconds = timed(lambda: balanced_partitions(lengths, parts))  # noqa: B023
        ours.append(imbalance(loads(found)))
        ours_ms.append(1e3 * seconds)
        if verl is not None:
            found, seconds = timed(lambda: verl(lengths, parts, equal_size=False))  # noqa: B023
            theirs.append(imbalance(loads(found)))
            theirs_ms.append(1e3 * seconds)
    percent = [f"{statistics.median(floor):.3f}", f"{statistics.median(ours):.3f}", f"{max(ours):.3f}"]
    percent += [f"{statistics.median(values):.3f}" if values else "-" for values in (theirs, simple)]
    return percent + [f"{statistics.median(values):.1f}" if values else "-" for values in (ours_ms, theirs_ms)]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    # what the other contestant left behind is not to be collected within this one's time
    gc.collect()
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def load_verl(folder: Path) -> Callable[..., list[list[int]]]:
    # last, so that torch and the like stay those of this environment
    sys.path.append(str(folder))
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    return get_seqlen_balanced_partitions  # type: ignore[no-any-return]


# --- the share of a step ---------------------------------------------------------------------------------------------


def step(arguments: argparse.Namespace) -> None:
    import torch

    import grpo_step
    from rlcore.config import validate_config
    from rlcore_recipes import grpo
    from rlcore_recipes.run.open import open_session
    from rlcore_recipes.step import add_advantages, add_scores, rollouts, update_policy
    from rlcore_recipes.step.update import training_columns

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        grpo_step.prepare(Path(name), arguments.steps + 3)
        folder = Path(name) / "rlcore"
        values: dict[str, Any] = {
            "model": {"path": str(folder / "model"), "tokenizer_path": str(folder / "tokenizer")},
            "data": {
                "train_files": [str(folder / "train.parquet")],
                "train_batch_size": grpo_step.PROMPTS,
                "max_prompt_length": 64,
                "max_response_length": grpo_step.MAX_NEW,
                "apply_chat_template": "never",
            },
            "actor": {"max_tokens_per_micro_batch": 4096, "optim": {"lr": 1e-4}},
            "rollout": {"n": grpo_step.GROUP},
            "reward": {"path": f"{Path(grpo_step.__file__).resolve()}:compute_score"},
            "trainer": {"out_dir": str(folder / "out"), "total_steps": arguments.steps + 1},
        }
        with open_session(validate_config(grpo.GRPOConfig, values)) as session:
            grpo.step(session, 1)
            seconds = [timed(lambda: grpo.step(session, number))[1] for number in range(2, arguments.steps + 2)]  # noqa: B023
            samples = rollouts(session, arguments.steps + 2)
            batch, _ = add_advantages(session, add_scores(session, samples.batch, samples))
            show("GRPO step", training_columns(batch), statistics.median(seconds), (2, 8, 64))

            batch = heavy_tailed_batch(grpo_step.PROMPTS * grpo_step.GROUP, 4096)
            seconds = [timed(lambda: update_policy(session, batch))[1] for _ in range(max(2, arguments.steps // 2))]
            show("heavy-tailed update", batch, statistics.median(seconds), (2, 8, 16))
    show("no step", heavy_tailed_batch(8_192, CAP), None, (8, 64))


def heavy_tailed_batch(n: int, cap: int) -> Batch:
    """The columns that a policy update reads, with random contents."""
    import torch

    lengths = torch.tensor([max(2, min(length, cap)) for length in lognormal(n, random.Random(0))])
    total = int(lengths.sum())
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(total)
    mask[lengths.cumsum(0) - lengths] = 0
    columns = {
        "tokens": torch.randint(3, 512, (total,), generator=draw),
        "loss_mask": mask,
        "rollout_logprobs": torch.full((total,), -6.0) * mask,
        "advantages": torch.randn(total, generator=draw) * mask,
    }
    return Batch({name: Jagged(values, lengths) for name, values in columns.items()})


def show(name: str, batch: Batch, step_s: float | None, ranks: Sequence[int]) -> None:
    tokens = int(batch.lengths.sum())
    print(f"{name}: {len(batch)} sequences, {tokens} tokens" + (f", {step_s:.2f} s" if step_s else ""))
    for parts in ranks:
        divide, copy = [], []
        for _ in range(9):
            indices, seconds = timed(lambda: partition(batch, parts))  # noqa: B023
            divide.append(seconds)
            copy.append(timed(lambda: [take(batch, part) for part in indices])[1])  # noqa: B023
        divided, copied = statistics.median(divide), statistics.median(copy)
        share = f" = {100 * (divided + copied) / step_s:.2f} % of it" if step_s else ""
        print(
            f"  {parts:4} ranks: partition {1e3 * divided:.2f} ms, all parts taken {1e3 * copied:.2f} ms{share}",
            flush=True,
        )


if __name__ == "__main__":
    main()
