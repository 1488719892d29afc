"""`PeerModel`: a model of transformers that samples as inference servers do, for peers of them in tests."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CACHED_PROMPTS = 64
LOADING = threading.Lock()
"""transformers (5.19) cannot load models in several threads at the same time."""


@dataclass(frozen=True)
class Draw:
    """Parameters of one completion; see `rlcore.engines.SamplingParams`. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """One sampled token, and logits ``[V]`` in float32 from which it was drawn."""

    token: int
    raw: torch.Tensor
    scaled: torch.Tensor
    filtered: torch.Tensor

    def logprob(self, kind: str) -> float:
        """Return the token's log-prob under the logits that ``kind`` names: raw, scaled, filtered."""
        logits: torch.Tensor = getattr(self, kind)
        return float(logits.log_softmax(-1)[self.token])


class PeerModel:
    """A model folder in float32 on the CPU. Threads may sample at the same time; forward passes take turns.

    Args:
        tokenizer: folder of the tokenizer; None is the model's.
    """

    def __init__(self, folder: Path, tokenizer: Path | None = None) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer or folder)
        self._turn = threading.Lock()
        self._first = OrderedDict[tuple[int, ...], torch.Tensor]()
        self.load(folder)

    def load(self, folder: Path | str) -> None:
        """Replace the weights by those in ``folder``; prefixes are forgotten."""
        from transformers import AutoModelForCausalLM

        with LOADING:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with self._turn:
            self._model, self.loaded = model.eval(), str(folder)
            self._first.clear()

    @property
    def config(self) -> Any:
        """Configuration of the model."""
        return self._model.config

    def stream(self, prompt: list[int], draw: Draw) -> Iterator[Drawn]:
        """Yield up to ``max_tokens`` tokens after ``prompt``, whatever they are."""
        generator = torch.Generator().manual_seed(draw.seed)
        cache: Any = None
        tokens = list(prompt)
        for count in range(draw.max_tokens):
            with self._turn, torch.inference_mode():
                logits = self._first.get(tuple(prompt)) if count == 0 else None
                if logits is None:
                    new = tokens if cache is None else tokens[-1:]
                    answer = self._model(
                        input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1
                    )
                    cache, logits = answer.past_key_values, answer.logits[0, -1].float()
                    if count == 0:
                        self._remember(tuple(prompt), logits)
            drawn = _drawn(logits, draw, generator)
            tokens.append(drawn.token)
            yield drawn

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Return the log-probs of the token after each of ``tokens``, ``[tokens, V]`` float32."""
        with self._turn, torch.inference_mode():
            logits: torch.Tensor = self._model(input_ids=torch.tensor([tokens])).logits
        return logits[0].float().log_softmax(-1)

    def _remember(self, prompt: tuple[int, ...], logits: torch.Tensor) -> None:
        self._first[prompt] = logits
        if len(self._first) > CACHED_PROMPTS:
            self._first.popitem(last=False)


def _drawn(logits: torch.Tensor, draw: Draw, generator: torch.Generator) -> Drawn:
    scaled = logits / (draw.temperature or 1.0)
    filtered = scaled.clone()
    if draw.top_k:
        filtered[filtered < filtered.topk(min(draw.top_k, len(filtered))).values[-1]] = -torch.inf
    ranked, order = filtered.softmax(-1).sort(descending=True)
    dropped = (ranked.cumsum(-1) - ranked >= draw.top_p) & (draw.top_p < 1)
    dropped |= ranked < draw.min_p * ranked[0]
    dropped[0] = False
    filtered[order[dropped]] = -torch.inf
    if draw.temperature == 0:
        return Drawn(int(logits.argmax()), logits, scaled, filtered)
    # the token with the smallest of independent exponential times, as inference servers draw it
    times = torch.empty_like(filtered).exponential_(generator=generator)
    return Drawn(int((filtered.softmax(-1) / times).argmax()), logits, scaled, filtered)
