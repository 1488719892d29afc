"""The vLLM rollout engine against vLLM itself, on the CPU: tokens per second, and seconds of a weight update.

    OMP_NUM_THREADS=1 uv run python benchmarks/vllm_overhead.py

Generation: the same model and requests by ``LLM.generate`` and by `VLLMRollout`, both in this process, in turns. Ours
draws with a seed per request and returns log-probs; so does vLLM here. On a noisy machine the ratio of processor time
counts. Weights: a full update, against loading the same weights from files, and starting a new engine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="length of every completion")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(arguments, Path(folder) / "model")


def report(arguments: argparse.Namespace, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rlcore.engines import GenerationRequest, SamplingParams, WeightBucket

    make_model(folder, arguments.hidden)
    started = time.perf_counter()
    ours = start_ours(folder)
    start_s = time.perf_counter() - started
    theirs = start_theirs(folder)
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 250) for _ in range(64)] for _ in range(arguments.prompts)]
    pairs = [(prompt, index) for index, prompt in enumerate(prompts * arguments.group)]
    requests = [
        GenerationRequest(prompt, SamplingParams(max_tokens=arguments.tokens, ignore_eos=True, seed=seed))
        for prompt, seed in pairs
    ]
    count = len(requests) * arguments.tokens
    ratios: list[float] = []
    for index in range(arguments.rounds + 1):
        cpu = time.process_time()
        their_s = timed(lambda: theirs.generate(*vllm_requests(pairs, arguments.tokens), use_tqdm=False))
        their_cpu_s = time.process_time() - cpu
        our_s = timed(lambda: ours.generate_batch(requests))
        our_cpu_s = time.process_time() - cpu - their_cpu_s
        if index:  # the first warms up
            ratios.append(our_cpu_s / their_cpu_s)
            print(
                f"round {index}: vLLM {count / their_s:.0f} tokens/s, rlcore {count / our_s:.0f}; "
                f"processor time {their_cpu_s:.2f} s and {our_cpu_s:.2f} s, ratio {ratios[-1]:.3f}"
            )
    print(f"ratio of processor time {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")

    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    buckets = [WeightBucket(tuple((name, tensor.detach()) for name, tensor in weights.named_parameters()))]
    update_s = statistics.median(
        timed(lambda version=version: ours.update_weights(buckets, version)) for version in range(1, 8)
    )

    def reload() -> None:
        weights.save_pretrained(folder)
        theirs.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        theirs.reset_prefix_cache()

    reload_s = statistics.median(timed(reload) for _ in range(5))
    size = sum(bucket.nbytes for bucket in buckets)
    print(
        f"weights of {size / 2**20:.1f} MiB: update {update_s:.3f} s, by files {reload_s:.3f} s, start {start_s:.1f} s"
    )
    ours.close()


def make_model(folder: Path, hidden: int) -> None:
    from rlcore_kit.testing.tiny_model import tiny_model

    tiny_model(
        folder,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )


def start_ours(folder: Path) -> Any:
    from rlcore.engines import ModelSettings, RolloutSpec
    from rlcore_vllm.engine import build
    from rlcore_vllm.settings import VLLMSettings

    settings = VLLMSettings(kv_cache_memory_bytes=128 << 20)
    return build(RolloutSpec(ModelSettings(path=str(folder)), settings, max_model_len=512))


def start_theirs(folder: Path) -> Any:
    from rlcore_vllm import quirks

    with quirks.no_worker_processes():
        from vllm import LLM

        return LLM(
            str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=256,
            kv_cache_memory_bytes=128 << 20,
        )


def vllm_requests(pairs: list[tuple[list[int], int]], tokens: int) -> tuple[list[Any], list[Any]]:
    from vllm import SamplingParams

    return [{"prompt_token_ids": prompt} for prompt, _ in pairs], [
        SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed, logprobs=0, detokenize=False) for _, seed in pairs
    ]


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
