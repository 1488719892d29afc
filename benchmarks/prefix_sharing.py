"""Shared prefixes in the FSDP engine: CPU seconds of a training step with and without them, interleaved, one thread.

    uv run python benchmarks/prefix_sharing.py --json shared.json

The ideal is the ratio of all tokens to distinct ones. Prompts and completions are random; completions have 0.5 to 1.5
times the stated length. Peak memory is that of a process that makes two steps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rlcore.algorithms.objectives import PolicyObjective, PolicyObjectiveSettings
from rlcore.batch import Batch, Jagged
from rlcore.engines import ModelSettings, OptimSettings, TrainEngineSpec
from rlcore_fsdp.engine import build
from rlcore_fsdp.prefix_sharing import divide_families
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.testing.tiny_model import tiny_model

# (tokens of a prompt, of a completion, completions of a prompt, prompts)
SHAPES = [
    (16, 64, 8, 8),
    (64, 64, 8, 8),
    (256, 64, 4, 4),
    (256, 64, 16, 2),
    (256, 64, 64, 1),
    (256, 256, 16, 1),
    (1000, 100, 8, 1),
    (2048, 128, 16, 1),
]
TREE = "tree"
"""Conversations of four turns, each of which two continue: 16 rows of 4 · 100 tokens after a prompt of 200."""


def rows_of(shape: Any, generator: torch.Generator) -> tuple[list[torch.Tensor], list[int]]:
    """Return the tokens of every row, and how many of them are its prompt."""

    def text(count: int) -> torch.Tensor:
        return torch.randint(3, 500, (count,), generator=generator)

    if shape == TREE:
        level = [text(200)]
        for _ in range(4):
            level = [torch.cat([row, text(100)]) for row in level for _ in range(2)]
        return level, [200] * len(level)
    prompt, completion, group, prompts = shape
    rows = []
    for _ in range(prompts):
        begin = text(prompt)
        for _ in range(group):
            length = int(completion * (0.5 + torch.rand(1, generator=generator).item()))
            rows.append(torch.cat([begin, text(max(length, 4))]))
    return rows, [prompt] * len(rows)


def batch_of(shape: Any) -> Batch:
    """Return a batch for the policy loss of PPO."""
    generator = torch.Generator().manual_seed(0)
    rows, prompts = rows_of(shape, generator)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.cat([(torch.arange(len(row)) >= prompt).float() for row, prompt in zip(rows, prompts)])
    total = int(lengths.sum())
    columns = {"loss_mask": mask, "advantages": torch.randn(total, generator=generator)}
    columns["old_logprobs"] = torch.full((total,), -6.0)
    return Batch(
        {"tokens": Jagged.from_list(rows), **{name: Jagged(values, lengths) for name, values in columns.items()}}
    )


def engine(folder: Path, share: bool, budget: int) -> Any:
    """Return an engine of a model with 4 layers of width 256."""
    settings = FSDPSettings(device="cpu", share_prefixes=share)
    return build(
        TrainEngineSpec(
            ModelSettings(path=str(folder)), settings, optim=OptimSettings(lr=1e-6), max_tokens=budget, max_length=4096
        )
    )


def peak_mib(folder: Path, shape: Any, share: bool, budget: int, answer: Any) -> None:
    """Send the peak resident memory of this process, in MiB, after two steps."""
    one, batch = engine(folder, share, budget), batch_of(shape)
    for _ in range(2):
        one.train(batch, PolicyObjective(PolicyObjectiveSettings()))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    answer.send(int(status["VmHWM"].split()[0]) / 1024)


def memory(folder: Path, shape: Any, budget: int) -> list[float]:
    """Return the peak memory with and without sharing, each of a new process."""
    found = []
    for share in (True, False):
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=peak_mib, args=(folder, shape, share, budget, there)
        )
        process.start()
        found.append(here.recv())
        process.join()
    return found


def measure(folder: Path, shape: Any, repeats: int, budget: int) -> dict[str, Any]:
    """Return medians of both, and the ratios."""
    batch = batch_of(shape)
    engines = [engine(folder, share, budget) for share in (True, False)]
    seconds: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):
        for one, spent in zip(engines, seconds):
            start = time.process_time()
            one.train(batch, PolicyObjective(PolicyObjectiveSettings()))
            if repeat:  # the first step warms up
                spent.append(time.process_time() - start)
    shared, plain = map(statistics.median, seconds)
    ratios = [b / a for a, b in zip(*seconds)]
    distinct = sum(divide_families(batch.flat("tokens"), batch.lengths.tolist(), 1 << 30)[1])
    total = batch.total_tokens
    with_sharing, without = memory(folder, shape, budget)
    return {
        "shape": shape if shape == TREE else "prompt {}, completion {}, group {}, {} prompts".format(*shape),
        "tokens": total,
        "distinct": distinct,
        "ideal": total / distinct,
        "shared_s": shared,
        "plain_s": plain,
        "ratio": plain / shared,
        "ratios": [min(ratios), max(ratios)],
        "mib": [with_sharing, without],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, nargs="*", help="which of the shapes, from 0; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.set_num_threads(1)
    found = []
    print("| shape | tokens → distinct | ideal | measured | spread | MiB | without |\n|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        model = tiny_model(Path(folder), **sizes, num_key_value_heads=2, vocab_size=512, max_position_embeddings=4096)
        shapes = [*SHAPES, TREE]
        for shape in [shapes[index] for index in options.shapes or range(len(shapes))]:
            row = measure(model, shape, options.repeats, options.budget)
            found.append(row)
            (low, high), (mib, without) = row["ratios"], row["mib"]
            print(
                f"| {row['shape']} | {row['tokens']:,} → {row['distinct']:,} | {row['ideal']:.2f} | "
                f"{row['ratio']:.2f} | "
                f"{low:.2f}–{high:.2f} | {mib:.0f} | {without:.0f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
