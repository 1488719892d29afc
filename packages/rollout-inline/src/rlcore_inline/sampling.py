"""Draw tokens for many rows together, each with separate sampling parameters and random numbers.

One uniform number picks each token from the cumulative distribution in float64. Rows are independent: the token of a
row depends on its logits and its uniform number only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlcore.engines.rollout import SamplingParams
from rlcore_inline.rounding import position_independent

CHUNK_ELEMENTS = 1 << 24
"""Maximum number of logits that are processed together, which bounds the memory of the float64 sums (128 MiB)."""


@dataclass(frozen=True)
class _Filters:
    """Rows with top-k, top-p or min-p: their indices ``[F]`` and parameters ``[F, 1]``."""

    rows: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def within(self, first: int, stop: int) -> _Filters:
        """Select the rows ``first`` to ``stop``, with indices relative to ``first``."""
        mine = ((self.rows >= first) & (self.rows < stop)).nonzero()[:, 0]
        return _Filters(self.rows[mine] - first, self.top_k[mine], self.top_p[mine], self.min_p[mine])


@dataclass(frozen=True)
class Sampler:
    """Sampling parameters of the running rows, as tensors where any row needs them.

    Attributes:
        temperature: ``[R, 1]``, 1 for greedy rows; None if it is 1 in all rows.
        greedy: ``[R]`` bool; None if no row is greedy.
        filters: top-k, top-p and min-p; None if no row has any.
    """

    temperature: torch.Tensor | None
    greedy: torch.Tensor | None
    filters: _Filters | None

    @classmethod
    def build(cls, params: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> Sampler:
        """Build the sampler of rows with ``params``, in this order."""

        def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        greedy = [p.temperature == 0 for p in params]
        heated = [p.temperature or 1.0 for p in params]
        rows = [
            row
            for row, p in enumerate(params)
            if not greedy[row] and (0 < p.top_k < vocabulary or p.top_p < 1 or p.min_p > 0)
        ]
        filters = None
        if rows:
            chosen = [params[row] for row in rows]
            filters = _Filters(
                torch.tensor(rows, device=device),
                column([p.top_k or vocabulary for p in chosen], torch.int64),
                column([p.top_p for p in chosen], torch.float64),
                column([p.min_p for p in chosen], torch.float32),
            )
        return cls(
            column(heated, torch.float32) if any(value != 1 for value in heated) else None,
            torch.tensor(greedy, device=device) if any(greedy) else None,
            filters,
        )

    def sample(self, logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw tokens ``[R]`` int64; return them and their log-probs ``[R]`` fp32 under softmax(logits / temperature).

        Args:
            logits: ``[R, V]``.
            uniform: ``[R]`` float64 in [0, 1), multiples of 2⁻⁵².
        """
        step = max(1, CHUNK_ELEMENTS // logits.shape[1])
        if len(logits) <= step:
            return self._sample(logits, uniform, 0)
        parts = [self._sample(logits[i : i + step], uniform[i : i + step], i) for i in range(0, len(logits), step)]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])

    def _sample(self, logits: torch.Tensor, uniform: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(first, first + len(logits))
        logits = logits.float()
        if self.temperature is not None:
            logits = logits / self.temperature[rows]
        probs = logits.softmax(-1)
        tokens, total = _pick(probs, uniform)
        if self.filters is not None:
            filters = self.filters.within(first, first + len(logits))
            tokens[filters.rows] = _pick_filtered(probs[filters.rows], uniform[filters.rows], filters)
        if self.greedy is not None:
            tokens = torch.where(self.greedy[rows], logits.argmax(-1), tokens)
        # With many tokens a float32 softmax sums to 1 only within 1e-5; its float64 sum removes that bias.
        chosen = probs.gather(-1, tokens[:, None])[:, 0].double() / total
        return tokens, position_independent(torch.log, chosen).float()


def _pick_filtered(probs: torch.Tensor, uniform: torch.Tensor, filters: _Filters) -> torch.Tensor:
    """Draw from ``probs`` ``[F, V]`` after top-k, top-p and min-p, in this order.

    Top-p (Holtzman et al., 2019) keeps the smallest set of best tokens with the given mass, relative to the tokens that
    top-k kept. The best token is always kept.
    """
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    kept = ranked.masked_fill(rank >= filters.top_k, 0)
    mass = kept.cumsum(-1, dtype=torch.float64)
    outside = mass - kept >= filters.top_p * mass[:, -1:]
    outside |= ranked < filters.min_p * ranked[:, :1]
    outside[:, 0] = False
    chosen, _ = _pick(kept.masked_fill(outside, 0), uniform)
    return order.gather(-1, chosen[:, None])[:, 0]


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of the token at ``uniform`` of the cumulative weights ``[R, V]``, and their sum ``[R]`` float64.

    A token without weight is never picked.

    ``uniform`` is at most 1 - 2⁻⁵², so its product with the total is below the total in float64. Weights that are NaN
    give some valid index.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    target = uniform[:, None] * total[:, None]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[1] - 1), total
