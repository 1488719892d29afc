"""Steps of supervised fine-tuning and of DPO: rlcore against TRL's trainers, on the same model, data and threads.

    uv run --with trl==1.16.0 python benchmarks/tasks.py sft dpo --threads 1

As in ``grpo_step.py`` every contestant is a process that makes one step when it is its turn. Reported are medians over
the steps after the warm-up, the ratio to the TRL step of the same turn, and peak resident memory.

What is measured: an optimizer step (AdamW, lr 1e-4, gradient norm 1) over a batch of prompts of 16 to 96 tokens and
answers of 8 to 256 tokens, a pair of them for DPO (β 0.1, reference log-probs computed in the step). Answers alone are
learned. A four-layer Qwen2 of width 256, fp32. TRL pads micro-batches of ``--micro-batch`` samples, rlcore packs
micro-batches of ``--micro-batch-tokens`` tokens. Samples are shuffled, by each contestant in its own way.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_step import Contestant, Turn, race, report

MAX_LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["sft", "dpo"], help="sft, dpo, or both")
    parser.add_argument("--steps", type=int, default=12, help="steps of each contestant, warm-up included")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="samples (pairs) of a step")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--micro-batch", type=int, default=8, help="TRL's samples (pairs) of one micro-batch")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="rlcore's tokens of one micro-batch")
    parser.add_argument("--contestants", nargs="+", default=["trl", "rlcore"], choices=["trl", "rlcore"])
    parser.add_argument("--worker", choices=["trl", "rlcore"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        {"trl": work_trl, "rlcore": work_rlcore}[arguments.worker](arguments.tasks[0], arguments)
        return
    for task in arguments.tasks:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), arguments)
            options = ("steps", "batch", "micro_batch", "micro_batch_tokens")
            shared = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in options]
            contestants = {
                name: Contestant([__file__, task, "--worker", name, "--folder", folder, *shared], arguments.threads)
                for name in arguments.contestants
            }
            print(f"{task}:")
            report(race(contestants, arguments.steps), arguments.warmup)


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the model, the tokenizer, and data that both libraries read."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    size = arguments.vocabulary
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, size)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    # not in the model's folder: there transformers would take a word tokenizer for Qwen2's
    tokenizer.save_pretrained(folder / "tokenizer")
    draw = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{draw.randint(3, size - 1)}" for _ in range(draw.randint(shortest, longest)))

    rows = [
        {"prompt": text(16, 96), "chosen": f" {text(8, 256)}", "rejected": f" {text(8, 256)}"}
        for _ in range(arguments.batch * (arguments.steps + 2))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "dpo.parquet")
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(answers), folder / "sft.parquet")


def work_trl(task: str, arguments: argparse.Namespace) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    turn = Turn(sys.stdout)
    sys.stdout = sys.stderr

    class Steps(TrainerCallback):  # type: ignore[misc]
        # A step is what happens between two on_step_end: fetching a batch comes before on_step_begin.
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.wait()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turn.done(0.0)
            turn.wait()

    trainer, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[task]
    trainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.folder / "model"),
        processing_class=AutoTokenizer.from_pretrained(arguments.folder / "tokenizer"),
        train_dataset=Dataset.from_parquet(str(arguments.folder / f"{task}.parquet")),
        callbacks=[Steps()],
        args=config(
            output_dir=str(arguments.folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=arguments.micro_batch,
            gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
            max_length=MAX_LENGTH,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.01,
            max_steps=arguments.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
    ).train()


def work_rlcore(task: str, arguments: argparse.Namespace) -> None:
    from rlcore.config import validate_config
    from rlcore_recipes import dpo, sft
    from rlcore_recipes.data.preferences import load_pairs
    from rlcore_recipes.data.sft import load_sft
    from rlcore_recipes.run.dataset_session import open_dataset_session
    from rlcore_recipes.settings.preference import PreferenceConfig
    from rlcore_recipes.settings.supervised import SFTConfig

    turn = Turn(sys.stdout)
    sys.stdout = sys.stderr
    values: dict[str, Any] = {
        "model": {"path": str(arguments.folder / "model"), "tokenizer_path": str(arguments.folder / "tokenizer")},
        "data": {
            "train_files": [str(arguments.folder / f"{task}.parquet")],
            "train_batch_size": arguments.batch,
            "max_length": MAX_LENGTH,
        },
        "actor": {
            "max_tokens_per_micro_batch": arguments.micro_batch_tokens,
            "optim": {"lr": 1e-4, "clip_grad": 1.0, "weight_decay": 0.01},
        },
        "trainer": {"out_dir": str(arguments.folder / "rlcore"), "total_steps": arguments.steps},
    }
    kind, load, step = {"sft": (SFTConfig, load_sft, sft.step), "dpo": (PreferenceConfig, load_pairs, dpo.step)}[task]
    with open_dataset_session(validate_config(kind, values), load) as session:
        for number in range(1, arguments.steps + 1):
            turn.wait()
            start = time.perf_counter()
            metrics = step(session, number)
            taken = session.timed.take()
            turn.done(
                metrics["perf/total_num_tokens"],
                data_part_s=taken.get("data", 0.0),
                step_part_s=time.perf_counter() - start,
            )


if __name__ == "__main__":
    main()
