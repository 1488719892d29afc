"""Measure the cost of a checkpoint: saved synchronously, and in the background, against steps without a checkpoint.

    uv run python benchmarks/checkpoint.py

A Qwen2 of 57 million parameters with its Adam moments (0.7 GB of fp32) trains on one process, then sharded over two,
with one thread each. A block is a few steps; blocks without a checkpoint, with a synchronous one, and with one
in the background alternate, so that a noisy machine disturbs all alike. Reported are, as medians over the rounds,

- the stall: seconds for which the training thread is in the manager's calls before and between the steps of a block;
- the wait: seconds at the end of the block until the checkpoint is complete (manifest written, flushed, renamed). A run
  does not wait there, as its next checkpoint is more than a block away;
- the steps of the block, relative to those of plain blocks: what the writing threads take from training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("none", "synchronous", "in the background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps in a block")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a step")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go; default: a temporary folder")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        prepare(Path(folder))
        for processes in arguments.processes:
            report(processes, arguments, Path(folder))


def prepare(folder: Path) -> None:
    from rlcore_kit.testing.tiny_model import tiny_model

    sizes = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 13, "head_dim": 80}
    tiny_model(folder / "model", num_attention_heads=8, num_key_value_heads=4, **sizes)


def report(processes: int, arguments: argparse.Namespace, folder: Path) -> None:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = [f"--rounds={arguments.rounds}", f"--steps={arguments.steps}", f"--tokens={arguments.tokens}"]
    output = subprocess.run(
        [*launcher, __file__, *options, f"--worker={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    result = json.loads(output.strip().splitlines()[-1])
    plain = statistics.median(second for block in result["none"] for second in block["steps"])
    print(
        f"\n{processes} process(es), {result['bytes'] / 1e9:.2f} GB per checkpoint, {plain:.2f} s per step", flush=True
    )
    for kind in KINDS[1:]:
        stalls = [block["stall"] for block in result[kind]]
        stall, wait = (statistics.median(block[part] for block in result[kind]) for part in ("stall", "wait"))
        slower = statistics.median(second for block in result[kind] for second in block["steps"]) / plain - 1
        print(
            f"  {kind:18s} stall {stall:.2f} s = {stall / plain:.1%} of a step "
            f"({min(stalls) / plain:.1%} to {max(stalls) / plain:.1%}); wait {wait:.2f} s; steps {slower:+.1%}",
            flush=True,
        )


def work(arguments: argparse.Namespace) -> None:
    """One process: prints the seconds of every block, by kind, as JSON, on rank 0."""
    import torch

    from rlcore.engines import ModelSettings, OptimSettings, TrainEngine, TrainEngineSpec
    from rlcore_fsdp.engine import build
    from rlcore_fsdp.settings import FSDPSettings
    from rlcore_kit.testing.train_engine import WeightedLogprobs, make_batch
    from rlcore_recipes.checkpoint import CheckpointManager, RunState
    from rlcore_recipes.ranks import executor

    torch.set_num_threads(1)
    model = ModelSettings(path=str(arguments.worker / "model"))
    engine = build(TrainEngineSpec(model, FSDPSettings(device="cpu"), optim=OptimSettings(lr=1e-4), max_tokens=512))
    actor = executor.workers(TrainEngine, engine, "actor")  # type: ignore[type-abstract]
    manager = CheckpointManager(arguments.worker / "checkpoints", keep=1, ranks=executor)
    batch = make_batch((128,) * (arguments.tokens // 128))
    blocks: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    number = 0
    for turn in range(arguments.rounds + 1):
        for kind in KINDS:
            stall, steps = 0.0, []
            for step in range(arguments.steps):
                executor.barrier()
                start = time.perf_counter()
                if kind != "none" and step == 0:
                    number += 1
                    saved = RunState(recipe="benchmark", step=number, run_id="benchmark", parts={})
                    manager.start(number, {"actor": actor}, saved, background=kind == KINDS[2])
                    if kind == KINDS[1]:
                        manager.finish()
                manager.poll()
                middle = time.perf_counter()
                actor.train(batch, WeightedLogprobs())
                stall += middle - start
                steps.append(time.perf_counter() - middle)
            start = time.perf_counter()
            manager.finish()
            if turn:  # the first round allocates buffers
                blocks[kind].append({"stall": stall, "steps": steps, "wait": time.perf_counter() - start})
    if executor.is_main:
        files = (arguments.worker / "checkpoints" / f"step-{number:06d}").rglob("*")
        print(json.dumps({**blocks, "bytes": sum(file.stat().st_size for file in files if file.is_file())}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
