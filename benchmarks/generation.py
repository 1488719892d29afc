"""Tokens per second of the inline rollout against `transformers.generate`, on the same model, prompts and lengths.

    uv run python benchmarks/generation.py --threads 1

The contestants take turns within one run, so that a noisy machine disturbs all of them alike; reported are medians over
the rounds, per second of wall time and of CPU time, and the median of the rounds' ratios to transformers.

What is measured: sampling at temperature 1 without filters, every completion of a length drawn in advance (between
``--min-new`` and ``--max-new``), end-of-sequence tokens ignored. The inline rollout also returns log-probs, which
transformers does not; transformers gets the whole batch, padded on the left, and its default (dynamic) cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, StoppingCriteria, StoppingCriteriaList

from rlcore.engines import GenerationRequest, ModelSettings, RolloutSpec, SamplingParams
from rlcore_inline.engine import build
from rlcore_inline.settings import InlineSettings


@dataclass(frozen=True)
class Work:
    """Prompts (each repeated for its group) and the length of every completion."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class PlainModel:
    """What the inline rollout needs of a training engine, around one unsharded model."""

    dp_rank, dp_size, step_count = 0, 1, 0

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device

    def generation_weights(self) -> AbstractContextManager[PreTrainedModel]:
        return nullcontext(self.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--group", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--min-new", type=int, default=64)
    parser.add_argument("--max-new", type=int, default=256)
    parser.add_argument("--running", type=int, default=128, help="max_running of the inline rollout")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = make_model(arguments)
    work = make_work(arguments)
    contestants: dict[str, Callable[[Work], int]] = {
        "inline (direct)": inline(model, arguments.running, "direct"),
        "inline (generic)": inline(model, arguments.running, "generic"),
        "transformers": transformers_generate(model),
    }
    print(
        f"{work.tokens} tokens, {len(work.prompts)} completions, {arguments.threads} threads, {arguments.rounds} rounds"
    )
    report(race(contestants, work, arguments.rounds), work)


def make_model(arguments: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 128),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype)).eval()


def make_work(arguments: argparse.Namespace) -> Work:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(24, 41, (arguments.prompts,), generator=generator).tolist()
    prompts = [torch.randint(3, arguments.vocabulary, (size,), generator=generator).tolist() for size in sizes]
    repeated = [prompt for prompt in prompts for _ in range(arguments.group)]
    lengths = torch.randint(arguments.min_new, arguments.max_new + 1, (len(repeated),), generator=generator)
    return Work(repeated, lengths.tolist())


# --- the contestants: each generates the work and returns how many tokens it made -----------------------------------


def inline(model: PreTrainedModel, running: int, decoder: str) -> Callable[[Work], int]:
    settings = InlineSettings(max_running=running, decoder=decoder)
    engine = build(RolloutSpec(ModelSettings(path="none"), settings, 4096, train_engine=PlainModel(model)))

    def generate(work: Work) -> int:
        requests = [
            GenerationRequest(prompt, SamplingParams(max_tokens=length, seed=index, ignore_eos=True))
            for index, (prompt, length) in enumerate(zip(work.prompts, work.lengths))
        ]
        return sum(len(completion.tokens) for completion in engine.generate_batch(requests))

    return generate


class PlannedLength(StoppingCriteria):
    """Ends every row at its own length."""

    def __init__(self, ends: torch.Tensor) -> None:
        self.ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def transformers_generate(model: PreTrainedModel) -> Callable[[Work], int]:
    def generate(work: Work) -> int:
        width = max(map(len, work.prompts))
        rows = [[0] * (width - len(prompt)) + prompt for prompt in work.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in work.prompts]
        lengths = torch.tensor(work.lengths, device=model.device)
        output = model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max(work.lengths),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            stopping_criteria=StoppingCriteriaList([PlannedLength(width + lengths)]),
        )
        return int(torch.minimum(lengths, torch.tensor(output.shape[1] - width)).sum())

    return generate


# --- measuring -------------------------------------------------------------------------------------------------------


def race(
    contestants: dict[str, Callable[[Work], int]], work: Work, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of wall and of CPU time per contestant and round, after one short round to warm up."""
    short = Work(work.prompts[:8], [4] * len(work.prompts[:8]))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for generate in contestants.values():
        generate(short)
    for _ in range(rounds):
        for name, generate in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            made = generate(work)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            assert made == work.tokens
    return times


def report(times: dict[str, list[tuple[float, float]]], work: Work) -> None:
    print(f"{'':<18}{'tok/s':>9}{'tok/CPU-s':>11}{'× transformers':>16}{'(CPU)':>8}")
    base = times["transformers"]
    for name, rounds in times.items():
        wall, cpu = (statistics.median(work.tokens / measured[kind] for measured in rounds) for kind in (0, 1))
        ratios = [statistics.median(other[kind] / own[kind] for own, other in zip(rounds, base)) for kind in (0, 1)]
        print(f"{name:<18}{wall:>9,.0f}{cpu:>11,.0f}{ratios[0]:>16.2f}{ratios[1]:>8.2f}")


if __name__ == "__main__":
    main()
