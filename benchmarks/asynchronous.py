"""Steps per second and staleness of GRPO with async.max_staleness=0, 1 and 2, where few completions are very long.

    uv run python benchmarks/asynchronous.py

A Qwen2 of a few million parameters trains on one process and generates on another, one thread each. The lengths of
completions are drawn from a log-normal distribution and forced, the longest some fifteen times the median: the end of
every synchronous step waits for a few long ones. All runs are up at the same time on one Ray cluster and take turns, a
block of steps each, so that a noisy machine disturbs all alike. Before a block nothing is under way anywhere; its first
steps, which find what was generated ahead, do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

PROMPTS, GROUP, LONGEST = 8, 4, 384
MEDIAN, SPREAD = 24.0, 1.2  # of the lengths' log-normal distribution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="counted steps in a block")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        prepare(Path(folder), arguments.hidden)
        report(arguments, Path(folder), stack)


def prepare(folder: Path, hidden: int) -> None:
    from rlcore_kit.testing.tiny_model import tiny_model

    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 4, "head_dim": hidden // 4}
    tiny_model(folder / "model", num_attention_heads=4, num_key_value_heads=2, **sizes)
    rows = [
        {"prompt": [{"role": "user", "content": f"say {number}"}], "ground_truth": "x", "data_source": "letters"}
        for number in range(512)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return sum(c.isascii() and c.islower() for c in solution_str) / max(len(solution_str), 1)\n"
    )


def length_of(position: int) -> int:
    """Tokens of the completions of a prompt: heavy-tailed, the same in every run."""
    drawn = random.Random(position).lognormvariate(math.log(MEDIAN), SPREAD)
    return min(max(round(drawn), 4), LONGEST)


def force_lengths() -> None:
    """Let every completion of a prompt have the length that `length_of` gives."""
    from rlcore_recipes.rollouts.episode import single_completion
    from rlcore_recipes.rollouts.group_job import GroupJob
    from rlcore_recipes.rollouts.plan import RolloutPlan

    def job(plan: RolloutPlan, sample: Any) -> GroupJob:
        sampling = plan.episode.keywords["sampling"]  # type: ignore[attr-defined]
        forced = replace(sampling, max_tokens=length_of(sample.position), ignore_eos=True)
        return GroupJob(sample, partial(single_completion, sampling=forced), plan.n, plan.seed, plan.purpose)

    RolloutPlan.job = job  # type: ignore[method-assign]


def report(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
    from rlcore.controller.placement import ResourcePool
    from rlcore_ray import cluster

    cluster.connect(None, {"all": ResourcePool(processes=3 * len(arguments.staleness))})
    stack.callback(cluster.disconnect)
    force_lengths()
    runs = {k: stack.enter_context(open_run(k, arguments, folder)) for k in arguments.staleness}
    found: dict[int, list[dict[str, float]]] = {k: [] for k in runs}
    numbers = dict.fromkeys(runs, 0)
    for round_number in range(arguments.rounds):
        for k, session in runs.items():
            settle(list(runs.values()))
            for place in range(arguments.steps + k + 1):
                numbers[k] += 1
                metrics = timed_step(session, numbers[k])
                if place > k:
                    found[k].append(metrics)
        print(f"round {round_number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print("| max_staleness | steps/s | step s (median) | waiting for samples s | staleness mean | max | later tokens |")
    print("|---|---|---|---|---|---|---|")
    for k, steps in found.items():

        def mean(name: str, steps: list[dict[str, float]] = steps) -> float:
            return statistics.fmean(step[name] for step in steps)

        print(
            f"| {k} | {1 / mean('seconds'):.2f} | {statistics.median(step['seconds'] for step in steps):.2f} "
            f"| {mean('timing_s/gen'):.2f} | {mean('rollout/staleness_mean'):.2f} "
            f"| {max(step['rollout/staleness_max'] for step in steps):.0f} "
            f"| {100 * mean('rollout/later_version_ratio'):.1f} % |"
        )


def open_run(k: int, arguments: argparse.Namespace, folder: Path) -> Any:
    from rlcore.config import validate_config
    from rlcore_recipes import grpo
    from rlcore_recipes.run.open import open_session

    pool, train, gen = {"cpus_per_process": 0.5}, f"train-{k}", f"gen-{k}"
    values: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {
            "train_files": [str(folder / "train.jsonl")],
            "train_batch_size": PROMPTS,
            "max_prompt_length": 32,
            "max_response_length": LONGEST,
        },
        "actor": {"fsdp": {"device": "cpu"}, "optim": {"lr": 1e-5}, "objective": {"correction": "tis"}},
        "rollout": {"n": GROUP, "inline": {"device": "cpu"}},
        "reward": {"path": f"{folder / 'reward.py'}:compute_score", "workers": 1},
        "trainer": {
            "out_dir": str(folder / f"out-{k}"),
            "total_steps": arguments.rounds * (arguments.steps + k + 1),
            "trackers": [],
        },
        "controller": {
            "kind": "ray",
            "pools": {train: pool, gen: pool},
            "placement": {"actor": train, "rollout": gen, "reward": gen, "compute": gen},
        },
        "async": {"max_staleness": k},
    }
    return open_session(validate_config(grpo.GRPOConfig, values))


def settle(sessions: list[Any]) -> None:
    """Wait until no run generates ahead any more."""
    sources = [session.groups for session in sessions if session.config.asynchronous.max_staleness > 0]
    while any(source.busy for source in sources):
        time.sleep(0.05)


def timed_step(session: Any, number: int) -> dict[str, float]:
    from rlcore_recipes import grpo

    start = time.perf_counter()
    metrics = grpo.step(session, number)
    session.executor.barrier()
    seconds = time.perf_counter() - start
    timings = {f"timing_s/{name}": value for name, value in session.timed.take().items()}
    return {**metrics, **timings, "seconds": seconds}


if __name__ == "__main__":
    main()
