"""GRPO on the quickstart's model and task, generating with ``inline`` and with vLLM: the learning curves side by side.

    OMP_NUM_THREADS=1 uv run python benchmarks/vllm_curves.py --seeds 0 1 2 --steps 140

Both engines start from one model per seed (the quickstart's SFT stage), with the same data, order, and seeds of all
samples; their random generators differ, so they sample other tokens. Runs take turns in separate processes. Writes
``curves.json`` and, with matplotlib, ``curves.png`` to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENGINES: dict[str, tuple[str, ...]] = {
    "inline": ("rollout.engine=inline",),
    "vllm": ("rollout.engine=vllm", "rollout.vllm.kv_cache_memory_bytes=134217728"),
}
LAST = 3
"""Validations whose mean is the result of a run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument(
        "--out", type=Path, default=Path("vllm-curves"), help="folder; runs that are in it are not repeated"
    )
    arguments = parser.parse_args()
    curves: dict[str, dict[int, list[tuple[int, float]]]] = {engine: {} for engine in ENGINES}
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        configuration = taught(folder, seed, arguments.steps)
        for engine, overrides in ENGINES.items():
            run = folder / engine
            if not (run / "seconds").exists():
                started = time.perf_counter()
                command = [sys.executable, "-m", "rlcore_recipes.grpo", "--config", str(configuration)]
                subprocess.run([*command, f"trainer.out_dir={run}", "trainer.trackers=[jsonl]", *overrides], check=True)
                (run / "seconds").write_text(f"{time.perf_counter() - started:.0f}")
            curves[engine][seed] = validations(run)
            print(f"seed {seed}, {engine}: {described(run, curves[engine][seed])}", flush=True)
    (arguments.out / "curves.json").write_text(json.dumps(curves))
    for engine, by_seed in curves.items():
        results = [result(curve) for curve in by_seed.values()]
        print(f"{engine}: mean over {len(results)} seeds {statistics.mean(results):.3f}")
    draw(curves, arguments.out / "curves.png")


def taught(folder: Path, seed: int, steps: int) -> Path:
    """The configuration of GRPO on a model that SFT made mediocre; both are in ``folder``."""
    from rlcore.config import dump_config
    from rlcore_recipes.data.prepare.arithmetic import arithmetic_problems
    from rlcore_recipes.data.prepare.writing import write_splits
    from rlcore_recipes.quickstart import settings
    from rlcore_recipes.quickstart.train_sft import train_sft
    from rlcore_recipes.small_model.qwen2 import SmallModelSettings, write_small_model

    configuration = folder / "grpo.yaml"
    if configuration.exists():
        return configuration
    splits = arithmetic_problems(settings.TASK, settings.TRAIN_PROBLEMS, settings.TEST_PROBLEMS, seed)
    write_splits(splits, folder / "data")
    texts = [text for row in splits["train"] for text in (row["prompt"][0]["content"], row["response"])]
    write_small_model(folder / "base", texts, SmallModelSettings(seed=seed, max_position_embeddings=256))
    config = settings.grpo_config(folder, seed, steps)
    train_sft(folder / "base", folder / "sft", config, lambda step, loss, accuracy: None)
    configuration.write_text(dump_config(config), encoding="utf-8")
    return configuration


def validations(run: Path) -> list[tuple[int, float]]:
    """``(step, fraction of right answers)`` on the held-out problems."""
    from rlcore_recipes.quickstart.settings import METRIC

    lines = metrics(run)
    return [(line["step"], line[METRIC]) for line in lines if METRIC in line]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def result(curve: list[tuple[int, float]]) -> float:
    return statistics.mean(accuracy for _, accuracy in curve[-LAST:])


def described(run: Path, curve: list[tuple[int, float]]) -> str:
    steps = [line for line in metrics(run) if "timing_s/gen" in line]
    generation = statistics.median(line["timing_s/gen"] for line in steps)
    seconds = (run / "seconds").read_text()
    return f"{curve[0][1]:.3f} to {result(curve):.3f} in {seconds} s, {generation:.2f} s a step for generation"


def draw(curves: dict[str, dict[int, list[tuple[int, float]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (engine, by_seed), colour in zip(curves.items(), ("tab:gray", "tab:blue"), strict=True):
        for curve in by_seed.values():
            axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.3, linewidth=1)
        steps = [step for step, _ in next(iter(by_seed.values()))]
        means = [statistics.mean(values) for values in zip(*([v for _, v in c] for c in by_seed.values()), strict=True)]
        axes.plot(steps, means, "o-", color=colour, markersize=4, label=f"{engine}, mean of {len(by_seed)} seeds")
    axes.set(xlabel="step", ylabel="fraction of right answers", ylim=(0, 1), title="GRPO, held-out problems")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
