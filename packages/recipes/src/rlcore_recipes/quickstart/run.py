"""The quickstart from beginning to end."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from rlcore.config import dump_config
from rlcore.errors import ConfigError
from rlcore_recipes import grpo
from rlcore_recipes.data.prepare.arithmetic import arithmetic_problems
from rlcore_recipes.data.prepare.writing import write_splits
from rlcore_recipes.quickstart import settings
from rlcore_recipes.quickstart.report import Curves, write_report
from rlcore_recipes.quickstart.train_sft import train_sft
from rlcore_recipes.small_model.qwen2 import SmallModelSettings, write_small_model


def run_quickstart(out: Path, seed: int, steps: int) -> None:
    """Data, tokenizer and model, SFT, GRPO, report; everything is written below ``out``.

    Raises:
        ConfigError: ``out`` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not an empty folder; name another, or remove it")
    console = Console(highlight=False)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    splits = arithmetic_problems(settings.TASK, settings.TRAIN_PROBLEMS, settings.TEST_PROBLEMS, seed)
    write_splits(splits, out / "data")
    example = splits["test"][0]
    console.print(f"[bold]1. Data[/] {len(splits['train']):,} word problems, {len(splits['test'])} held out, such as")
    console.print(f"   {example['prompt'][0]['content']}\n   {example['response']!r}", style="dim")

    texts = [text for row in splits["train"] for text in (row["prompt"][0]["content"], row["response"])]
    parameters = write_small_model(out / "base", texts, SmallModelSettings(seed=seed, max_position_embeddings=256))
    console.print(f"[bold]2. Model[/] Qwen2 with {parameters:,} random parameters, tokenizer trained on the problems")

    console.print(f"[bold]3. SFT[/] on worked solutions, until {settings.MEDIOCRE:.0%} of sampled answers are right")
    config = settings.grpo_config(out, seed, steps)
    curves = Curves()

    def report(step: int, loss: float, accuracy: float) -> None:
        curves.sft.append((step, accuracy))
        console.print(f"   step {step:>3}  loss {loss:.3f}  accuracy {accuracy:.3f}", style="dim")

    train_sft(out / "base", out / "sft", config, report)

    console.print(f"[bold]4. GRPO[/] {steps} steps, from rewards alone")
    (out / "grpo.yaml").write_text(dump_config(config), encoding="utf-8")
    grpo.run(config)

    summary = write_report(out, curves, time.perf_counter() - started, seed)
    console.print(
        f"[bold]Accuracy[/] on {len(splits['test'])} held-out problems, sampled at temperature 1: "
        f"[bold]{summary['accuracy_sft']:.1%}[/] after SFT, [bold]{summary['accuracy_rl']:.1%}[/] after GRPO, "
        f"in {summary['seconds']:.0f} s"
    )
    console.print(
        f"{out}/curves.png   the learning curve\n"
        f"{out}/samples.md    answers before and after\n"
        f"{out}/grpo/model    the model, for transformers' from_pretrained\n"
        f"{out}/summary.json  these numbers\n"
        f"Go on training:     {summary['continue']}",
        soft_wrap=True,
    )
