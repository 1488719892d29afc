"""Products that a tiny model cannot compute, and a calculator that it may call.

python calculator.py runs/calculator    # writes a model with random weights, and data
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tiny_chat_model import write_model

from rlcore.engines.episode import PromptSample
from rlcore_agents import Environment, Reply, Step
from rlcore_agents.tools.shipped.calculator import calculator_tool


class Calculator(Environment):
    """A product to compute: 1 for the right number, 0 for any other."""

    tools = (calculator_tool(),)

    def reset(self, sample: PromptSample, seed: int) -> None:
        self.product = sample.ground_truth

    def step(self, reply: Reply) -> Step:
        return Step(done=True, score=float(reply.text == self.product))


def row(a: int, b: int) -> dict[str, Any]:
    """Return a row for reinforcement learning."""
    question = [{"role": "user", "content": f"{a}*{b}"}]
    return {"prompt": question, "ground_truth": str(a * b), "data_source": "products"}


def conversation(a: int, b: int, calls: bool) -> dict[str, Any]:
    """Return a row for SFT, in which the calculator is called or not."""
    messages: list[dict[str, Any]] = list(row(a, b)["prompt"])
    if calls:
        call = {"name": "calculator", "arguments": {"expression": f"{a}*{b}"}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": str(a * b)},
        ]
    messages.append({"role": "assistant", "content": str(a * b)})
    return {"messages": messages, "tools": [calculator_tool().schema()]}


def main(folder: Path, calls: float = 0.4, held_out: int = 200) -> None:
    """Write the model and ``sft.jsonl``, ``train.jsonl`` and ``test.jsonl``; ``calls`` is the share that calls."""
    generator = random.Random(0)
    pairs = [(a, b) for a in range(32, 100) for b in range(32, 100)]  # products have four digits
    generator.shuffle(pairs)
    test, train = pairs[:held_out], pairs[held_out:]
    files = {
        "sft": [conversation(a, b, generator.random() < calls) for a, b in train],
        "train": [row(a, b) for a, b in train],
        "test": [row(a, b) for a, b in test],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    write_model(folder / "model", files["sft"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
