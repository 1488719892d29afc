"""A game of two turns: guess a number from 1 to 3 with two guesses. Only a policy that reads the hint always wins.

python guess.py runs/guess    # writes a model with random weights, and data
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_chat_model import write_model

from rlcore.engines.episode import PromptSample
from rlcore_agents import Environment, Reply, Step

NUMBERS = ("1", "2", "3")
QUESTION = "Guess 1, 2 or 3."


class Guess(Environment):
    """1 for the right number, and a little for answers that are numbers at all."""

    def reset(self, sample: PromptSample, seed: int) -> str:
        self.secret, self.left = sample.ground_truth, 2
        return QUESTION

    def step(self, reply: Reply) -> Step:
        self.left -= 1
        guess = reply.text
        won, valid = guess == self.secret, guess in NUMBERS
        if won or not valid or not self.left:
            return Step(done=True, score=won + 0.2 * valid, info={"won": float(won)})
        return Step("higher" if guess < self.secret else "lower")


def conversation(generator: random.Random, first: Sequence[str]) -> dict[str, Any]:
    """Return a game in which guesses and hints are random: its form alone can be learned."""
    guesses = [generator.choice(first), generator.choice(NUMBERS)]
    turns = [("user", QUESTION), ("assistant", guesses[0])]
    turns += [("user", generator.choice(["higher", "lower"])), ("assistant", guesses[1])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def main(folder: Path, first: Sequence[str] = NUMBERS) -> None:
    """Write the model, ``sft.jsonl`` and ``train.jsonl``; ``first`` are the first guesses to imitate."""
    generator = random.Random(0)
    files = {
        "sft": [conversation(generator, first) for _ in range(512)],
        "train": [{"prompt": QUESTION, "ground_truth": number, "data_source": "guess"} for number in NUMBERS] * 8,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(folder / "model", files["sft"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
