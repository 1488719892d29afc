"""The report of a quickstart: curves, samples before and after, summary."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlcore_recipes.quickstart.settings import METRIC, TEST_PROBLEMS


@dataclass
class Curves:
    """Points ``(step, fraction of right answers)`` of each stage."""

    sft: list[tuple[int, float]] = field(default_factory=list)
    grpo: list[tuple[int, float]] = field(default_factory=list)
    reward: list[tuple[int, float]] = field(default_factory=list)


def write_report(out: Path, curves: Curves, seconds: float, seed: int) -> dict[str, Any]:
    """Write ``curves.png``, ``samples.md`` and ``summary.json`` from the metrics of the run in ``out/grpo``."""
    lines = read_lines(out / "grpo/metrics.jsonl")
    curves.grpo = [(line["step"], line[METRIC]) for line in lines if METRIC in line]
    curves.reward = [(line["step"], line["critic/score/mean"]) for line in lines if "critic/score/mean" in line]
    steps = lines[-1]["step"]
    summary = {
        "accuracy_sft": curves.grpo[0][1],
        "accuracy_rl": curves.grpo[-1][1],
        "seconds": round(seconds, 1),
        "seed": seed,
        "problems": TEST_PROBLEMS,
        "sft_steps": curves.sft[-1][0],
        "grpo_steps": steps,
        "continue": f"rlcore run grpo --config {shlex.quote(str(out / 'grpo.yaml'))} trainer.total_steps={2 * steps}",
    }
    draw(curves, out / "curves.png")
    (out / "samples.md").write_text(samples(read_lines(out / "grpo/tables/val-generations.jsonl")), encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # str's also ends lines at U+2028


def draw(curves: Curves, path: Path) -> None:
    """Draw the learning curves into ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    taught, learned = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    taught.plot(*zip(*curves.sft), "o-", color="tab:gray", markersize=3, label="held-out problems")
    taught.set(title="SFT on worked solutions", xlabel="step", ylabel="fraction of right answers")
    learned.plot(*zip(*curves.reward), color="tab:blue", alpha=0.4, label="training reward")
    learned.plot(*zip(*curves.grpo), "o-", color="tab:blue", markersize=4, label="held-out problems")
    learned.set(title="GRPO from rewards alone", xlabel="step", ylim=(0, 1))
    for axes in (taught, learned):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is learned else "upper left")
    figure.savefig(path, dpi=150)


def samples(rows: list[dict[str, Any]]) -> str:
    """Return the answers to the same problems at the first and the last validation, as Markdown."""
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    before = [row for row in rows if row["step"] == first]
    after = [row for row in rows if row["step"] == last]
    parts = ["# Answers before and after GRPO\n"]
    for old, new in zip(before, after):
        parts.append(f"**{old['prompt'].removeprefix('user: ')}** (right: {old['ground_truth']})\n")
        for name, row in (("before", old), ("after", new)):
            mark = "right" if row["score"] else "wrong"
            parts.append(f"{name}, {mark}:\n\n```\n{row['completion']}\n```\n")
    return "\n".join(parts)
