"""The SGLang rollout engine against the server's bare HTTP API, on the CPU: tokens per second, and weight updates.

    PYTHONPATH=packages/rollout-sglang/tests/cpu_shim OMP_NUM_THREADS=1 python benchmarks/sglang_overhead.py

in an environment with rlcore-rollout-sglang and sglang (``uvx nox -s tests-rollout-sglang`` makes one). Generation:
the same requests to the same server by plain ``httpx`` calls of ``/generate`` and by the engine, in turns; the server's
work dominates, so this process's time is given besides. Weights: full updates by every way.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="length of every completion")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(arguments, Path(folder))


def report(arguments: argparse.Namespace, folder: Path) -> None:
    import os

    from rlcore.engines import GenerationRequest, SamplingParams

    model = make_model(folder / "model", arguments.hidden)
    started = time.perf_counter()
    ours = start(folder, model)
    print(f"start {time.perf_counter() - started:.1f} s")
    (server,) = ours.engines.values()
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 250) for _ in range(64)] for _ in range(arguments.prompts)]
    requests = [
        GenerationRequest(prompt, SamplingParams(max_tokens=arguments.tokens, ignore_eos=True, seed=seed), group=seed)
        for seed, prompt in enumerate(prompts * arguments.group)
    ]
    count = len(requests) * arguments.tokens
    ratios, cpu_ms = [], []
    for index in range(arguments.rounds + 1):
        their_s, their_cpu_s = timed(lambda: asyncio.run(bare(server.url, server.process.api_key, requests)))
        our_s, our_cpu_s = timed(lambda: ours.generate_batch(requests))
        if index:  # the first warms up
            ratios.append(our_s / their_s)
            cpu_ms.append(1e3 * (our_cpu_s - their_cpu_s) / len(requests))
            print(
                f"round {index}: bare {count / their_s:.0f} tokens/s, rlcore {count / our_s:.0f}; "
                f"this process's time {their_cpu_s:.2f} s and {our_cpu_s:.2f} s"
            )
    print(
        f"ratio of wall-clock time {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f}), "
        f"{statistics.median(cpu_ms):.2f} ms of processor time per request more"
    )
    os.environ[KEY] = server.process.api_key
    for way in ("tensor", "distributed", "disk"):
        update(way, server.url, model, folder)
    ours.close()


KEY = "RLCORE_BENCHMARK_KEY"


def update(way: str, url: str, model: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rlcore.engines import ModelSettings, RolloutSpec, WeightBucket
    from rlcore_sglang.engine import build
    from rlcore_sglang.settings import SGLangSettings

    settings = SGLangSettings(
        urls=(url,), api_key_env=KEY, weights=way, weights_dir=folder / "weights", keep_weights=False
    )
    engine = build(RolloutSpec(ModelSettings(path=str(model)), settings, max_model_len=512))
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    bucket = WeightBucket(tuple((name, tensor.detach()) for name, tensor in weights.named_parameters()))
    seconds = [timed(lambda version=version: engine.update_weights([bucket], version))[0] for version in range(1, 8)]
    print(f"weights of {bucket.nbytes / 2**20:.1f} MiB by {way}: {statistics.median(seconds):.3f} s")
    engine.close()


async def bare(url: str, key: str, requests: list[Any]) -> None:
    import httpx

    async with httpx.AsyncClient(
        base_url=url,
        timeout=600,
        trust_env=False,
        headers={"Authorization": f"Bearer {key}"},
        limits=httpx.Limits(max_connections=264, max_keepalive_connections=264),
    ) as client:

        async def one(request: Any) -> Any:
            body = {
                "input_ids": request.prompt,
                "return_logprob": True,
                "sampling_params": {
                    "max_new_tokens": request.sampling.max_tokens,
                    "ignore_eos": True,
                    "sampling_seed": request.sampling.seed,
                },
            }
            return (await client.post("/generate", json=body)).raise_for_status().json()

        await asyncio.gather(*map(one, requests))


def start(folder: Path, model: Path) -> Any:
    from rlcore.engines import ModelSettings, RolloutSpec
    from rlcore_sglang.engine import build
    from rlcore_sglang.settings import SGLangSettings

    settings = SGLangSettings(
        device="cpu",
        mem_fraction_static=0.3,
        max_total_tokens=32768,
        log_dir=folder / "logs",
        args={"grammar_backend": "none"},
    )
    return build(RolloutSpec(ModelSettings(path=str(model)), settings, max_model_len=512))


def make_model(folder: Path, hidden: int) -> Path:
    from rlcore_kit.testing.tiny_model import tiny_model

    return tiny_model(
        folder,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )


def timed(work: Any) -> tuple[float, float]:
    """Wall-clock seconds, and this process's."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


if __name__ == "__main__":
    main()
