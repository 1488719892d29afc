"""A full GRPO step: rlcore against TRL's `GRPOTrainer`, on the same model, prompts, lengths and threads.

    uv run --with trl==1.16.0 python benchmarks/grpo_step.py --threads 2

Every contestant is a process that makes one step when told to; the processes take turns within one run, so a noisy
machine disturbs all of them alike. Reported are medians over the steps after the warm-up, each step's ratio to the TRL
step made in the same turn, and peak resident memory (summed over a contestant's processes).

What is measured: 16 prompts of 24 to 39 tokens, 8 completions each of at most 64 tokens, temperature 1, normalised
advantages, clip 0.2, token-mean loss, no reference model, one AdamW step (lr 1e-4, gradient norm 1). A four-layer Qwen2
of width 256 over 512 tokens, fp32. Data-parallel contestants get the same batch, divided, with one thread a process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rlcore_kit.serving.ports import unused_port

PROMPTS, GROUP, MAX_NEW, VOCABULARY = 16, 8, 64, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps of each contestant, warm-up included")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of the single-process contestants")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="rlcore's token budget of one micro-batch")
    parser.add_argument("--contestants", nargs="+", default=["trl", "rlcore", "rlcore-dp2"], choices=sorted(WORLD))
    parser.add_argument("--worker", choices=["trl", "rlcore"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        {"trl": work_trl, "rlcore": work_rlcore}[arguments.worker](arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), arguments.steps)
            contestants = {name: contestant(name, arguments, Path(folder)) for name in arguments.contestants}
            report(race(contestants, arguments.steps), arguments.warmup)


# --- the race --------------------------------------------------------------------------------------------------------

WORLD = {"trl": 1, "rlcore": 1, "rlcore-dp2": 2}


def contestant(name: str, arguments: argparse.Namespace, folder: Path) -> Contestant:
    command = [__file__, "--worker", name.split("-")[0], "--folder", str(folder / name)]
    command += ["--steps", str(arguments.steps), "--micro-batch-tokens", str(arguments.micro_batch_tokens)]
    return Contestant(command, arguments.threads, WORLD[name])


class Contestant:
    """The processes of one contestant; `step` makes one step in all of them and returns what it cost.

    Args:
        command: script and arguments.
        threads: of a contestant of one process; several have one each.
    """

    def __init__(self, command: list[str], threads: int, world: int = 1) -> None:
        port = unused_port()
        self.processes = []
        for rank in range(world):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(threads if world == 1 else 1),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "TRL_EXPERIMENTAL_SILENCE": "1",
            }
            if world > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def step(self) -> dict[str, float]:
        start = time.perf_counter()
        for process in self.processes:
            assert process.stdin
            process.stdin.write("step\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self.processes]
        return {
            "wall_s": time.perf_counter() - start,
            "cpu_s": sum(answer["cpu_s"] for answer in answers),
            "peak_gb": sum(answer["peak_gb"] for answer in answers),
            "tokens": answers[0]["tokens"],
            **{name: value for name, value in answers[0].items() if name.endswith("_part_s")},
        }

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise SystemExit(f"a contestant ended early with exit code {process.wait()}; see its output above")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def race(contestants: Mapping[str, Contestant], steps: int) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    try:
        for step in range(steps):
            for name, contestant in contestants.items():
                results[name].append(contestant.step())
                print(f"step {step + 1} {name}: {results[name][-1]['wall_s']:.2f} s", file=sys.stderr, flush=True)
    finally:
        for contestant in contestants.values():
            contestant.close()
    return results


def report(results: dict[str, list[dict[str, float]]], warmup: int) -> None:
    print(f"{'':12} {'wall s':>8} {'CPU s':>8} {'tokens':>8} {'peak GB':>8} {'speed/TRL':>10} {'memory/TRL':>11}")
    reference = results.get("trl")
    for name, steps in results.items():
        steps = steps[warmup:]
        row = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        row["peak_gb"] = max(step["peak_gb"] for step in steps)
        ratios = ""
        if reference and name != "trl":
            speed = statistics.median(a["wall_s"] / b["wall_s"] for a, b in zip(reference[warmup:], steps, strict=True))
            memory = row["peak_gb"] / max(step["peak_gb"] for step in reference)
            ratios = f"{speed:>9.2f}x {memory:>10.0%}"
        print(f"{name:12} {row['wall_s']:8.2f} {row['cpu_s']:8.2f} {row['tokens']:8.0f} {row['peak_gb']:8.2f} {ratios}")
        parts = {key.removesuffix("_part_s"): value for key, value in row.items() if key.endswith("_part_s")}
        if parts:
            print(" " * 12, ", ".join(f"{part} {value:.2f} s" for part, value in parts.items()))


# --- what every contestant starts from -------------------------------------------------------------------------------


def prepare(folder: Path, steps: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    draw = random.Random(0)
    prompts = [
        " ".join(f"w{draw.randint(3, VOCABULARY - 1)}" for _ in range(draw.randint(24, 39)))
        for _ in range(PROMPTS * (steps + 2))
    ]
    for name in WORLD:
        (folder / name).mkdir()
        model.save_pretrained(folder / name / "model")
        # not in the model's folder: there transformers would take a word tokenizer for Qwen2's
        tokenizer.save_pretrained(folder / name / "tokenizer")
        rows = {"prompt": prompts, "ground_truth": [""] * len(prompts), "data_source": ["words"] * len(prompts)}
        pq.write_table(pa.table(rows), folder / name / "train.parquet")


def even_words(text: str) -> float:
    """The reward: the fraction of words with an even number."""
    words = [word for word in text.split() if word[0] == "w"]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
    return even_words(solution_str)


class Turn:
    """Waits for the word to make a step, and answers what the step cost."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers

    def wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit(0)
        self.cpu = time.process_time()

    def done(self, tokens: float, **parts: float) -> None:
        answer = {
            "cpu_s": time.process_time() - self.cpu,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "tokens": tokens,
            **parts,
        }
        print(json.dumps(answer), file=self.answers, flush=True)


# --- the contestants -------------------------------------------------------------------------------------------------


def work_trl(arguments: argparse.Namespace) -> None:
    import pyarrow.parquet as pq
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    turn = Turn(sys.stdout)
    sys.stdout = sys.stderr
    generated = {"tokens": 0.0, "seconds": 0.0}

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = super()._generate_single_turn(*args, **kwargs)
            generated["seconds"] = time.perf_counter() - start
            return result

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._generate_and_score_completions(*args, **kwargs)
            generated["tokens"] = float(result["completion_mask"].sum())
            return result

    class Steps(TrainerCallback):  # type: ignore[misc]
        # A step is what happens between two on_step_end: fetching a batch (which generates) comes before on_step_begin.
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.wait()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turn.done(generated["tokens"], generate_part_s=generated["seconds"])
            turn.wait()

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.folder / "model"),
        processing_class=AutoTokenizer.from_pretrained(arguments.folder / "tokenizer", padding_side="left"),
        reward_funcs=lambda completions, **_: [even_words(completion) for completion in completions],
        train_dataset=Dataset.from_list(
            pq.read_table(arguments.folder / "train.parquet").select(["prompt"]).to_pylist()
        ),
        callbacks=[Steps()],
        args=GRPOConfig(
            output_dir=str(arguments.folder / "out"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=MAX_NEW,
            gradient_accumulation_steps=1,
            num_iterations=1,
            beta=0.0,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_steps=arguments.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            temperature=1.0,
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.train()


def work_rlcore(arguments: argparse.Namespace) -> None:
    from rlcore.config import validate_config
    from rlcore_recipes import grpo
    from rlcore_recipes.run.open import open_session

    turn = Turn(sys.stdout)
    sys.stdout = sys.stderr
    values: dict[str, Any] = {
        "model": {"path": str(arguments.folder / "model"), "tokenizer_path": str(arguments.folder / "tokenizer")},
        "data": {
            "train_files": [str(arguments.folder / "train.parquet")],
            "train_batch_size": PROMPTS,
            "max_prompt_length": 64,
            "max_response_length": MAX_NEW,
            "apply_chat_template": "never",
        },
        "actor": {
            "max_tokens_per_micro_batch": arguments.micro_batch_tokens,
            "optim": {"lr": 1e-4, "clip_grad": 1.0},
            "objective": {"policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2}},
        },
        "rollout": {"n": GROUP, "temperature": 1.0},
        "reward": {"path": f"{Path(__file__).resolve()}:compute_score"},
        "trainer": {"out_dir": str(arguments.folder / "out"), "total_steps": arguments.steps},
    }
    with open_session(validate_config(grpo.GRPOConfig, values)) as session:
        for number in range(1, arguments.steps + 1):
            turn.wait()
            metrics = grpo.step(session, number)
            parts = {f"{name}_part_s": seconds for name, seconds in session.timed.take().items()}
            turn.done(metrics["response_length/mean"] * PROMPTS * GROUP, **parts)


if __name__ == "__main__":
    main()
