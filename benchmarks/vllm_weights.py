"""Measure all ways of updating the weights of vLLM engines on the CPU: seconds, and bytes transferred.

    OMP_NUM_THREADS=1 uv run python benchmarks/vllm_weights.py

In process weights go by reference; to an engine in a separate process by shared memory; to a rollout process of another
machine, simulated by loopback, by gloo, in full or as the elements whose bits changed; by files as safetensors that
vLLM's ``reload_weights`` reads; and by starting a new engine. Weights are bfloat16 and change by optimizer
steps at a learning rate of 1e-6. Every update ends with a completion whose tokens vLLM labels with the new version.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

BUCKET_BYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(arguments, Path(folder) / "model")


def report(arguments: argparse.Namespace, folder: Path) -> None:
    trainer = Trainer(folder, arguments.hidden, arguments.layers)
    print(f"{trainer.nbytes / 2**20:.0f} MiB of weights; medians of {arguments.updates} updates")
    print("| way | s | MiB that travel |")
    print("|---|---|---|")
    starts: dict[str, float] = {}
    for mode in ("in_process", "process"):
        start = time.perf_counter()
        engine = start_engine(folder, mode)
        complete(engine)
        starts[mode] = time.perf_counter() - start
        ways: dict[str, Callable[[Any, int], int]] = {"handed over" if mode == "in_process" else "shm": trainer.give}
        if mode == "in_process":
            for name, delta in (("gloo, whole", False), ("gloo, changes", True)):
                ways[name] = Link(trainer, delta)
        if mode == "process":
            ways["files"] = partial(trainer.give_files, folder)
        version = 0
        for name, give in ways.items():
            taken: list[float] = []
            sent: list[int] = []
            for index in range(arguments.updates + 1):
                trainer.step()
                version += 1
                start = time.perf_counter()
                sent.append(give(engine, version))
                (completion,) = complete(engine)
                if index:  # the first opens connections, and a delta has nothing to start from
                    taken.append(time.perf_counter() - start)
                if name != "files":
                    assert completion.versions == [(version, 1)]
            row(f"{mode}: {name}", statistics.median(taken), statistics.median(sent[1:]))
        engine.close()
    for mode, seconds in starts.items():
        row(f"{mode}: starting an engine", seconds, trainer.nbytes)


def row(name: str, seconds: float, nbytes: float) -> None:
    print(f"| {name} | {seconds:.2f} | {nbytes / 2**20:.1f} |", flush=True)


class Trainer:
    """A model whose weights take small steps: float32 masters, bfloat16 weights."""

    def __init__(self, folder: Path, hidden: int, layers: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from rlcore_kit.testing.tiny_model import tiny_model

        tiny_model(
            folder,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            tie_word_embeddings=False,
        )
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.save_pretrained(folder)
        self.masters = {name: tensor.detach().float() for name, tensor in self.model.named_parameters()}
        self.weights = {name: tensor.bfloat16() for name, tensor in self.masters.items()}
        self.nbytes = sum(tensor.nbytes for tensor in self.weights.values())

    def step(self) -> None:
        import torch

        for name, master in self.masters.items():
            master.add_(torch.randn_like(master).sign_(), alpha=1e-6)
            self.weights[name] = master.bfloat16()

    def buckets(self) -> Iterator[Any]:
        from rlcore.engines import WeightBucket

        pairs: list[tuple[str, Any]] = []
        for name, tensor in self.weights.items():
            pairs.append((name, tensor))
            if sum(tensor.nbytes for _, tensor in pairs) >= BUCKET_BYTES:
                yield WeightBucket(tuple(pairs))
                pairs = []
        if pairs:
            yield WeightBucket(tuple(pairs))

    def give(self, engine: Any, version: int) -> int:
        engine.update_weights(self.buckets(), version)
        return self.nbytes

    def give_files(self, folder: Path, engine: Any, version: int) -> int:
        """As one would without an update: write a checkpoint and have vLLM read it."""
        self.model.load_state_dict(self.weights)
        self.model.save_pretrained(folder)
        backend = engine._backend
        backend.pause()
        backend.call_workers("reload_weights", None, str(folder), timeout_s=300)
        backend.forget_prefixes(None)
        backend.resume()
        return self.nbytes


class Link:
    """Weights by gloo, as to a rollout process of another machine."""

    def __init__(self, trainer: Trainer, delta: bool) -> None:
        from rlcore_kit.weight_transfer import open_receiver, open_sender

        self._trainer = trainer
        self._sender, address = open_sender("gloo", receivers=1, bucket_bytes=BUCKET_BYTES, delta=delta, timeout_s=300)
        self._receiver = open_receiver(address, 0)
        self._executor = ThreadPoolExecutor(1)

    def __call__(self, engine: Any, version: int) -> int:
        receiving = self._executor.submit(self._receiver.load_into, engine)
        stats = self._sender.send(self._trainer.buckets(), version)
        receiving.result()
        return stats.sent_bytes


def start_engine(folder: Path, mode: str) -> Any:
    from rlcore.engines import ModelSettings, RolloutSpec
    from rlcore_vllm.engine import build
    from rlcore_vllm.settings import VLLMSettings

    settings = VLLMSettings(mode=mode, dtype="bfloat16", kv_cache_memory_bytes=64 << 20)
    return build(RolloutSpec(ModelSettings(path=str(folder)), settings, max_model_len=256))


def complete(engine: Any) -> Any:
    from rlcore.engines import GenerationRequest, SamplingParams

    return engine.generate_batch([GenerationRequest([5, 8, 13], SamplingParams(max_tokens=1, ignore_eos=True))])


if __name__ == "__main__":
    main()
