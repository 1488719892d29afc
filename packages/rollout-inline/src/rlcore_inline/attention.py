"""Attention over the KV cache: causal attention of prompts, and attention of one new token per row to its past.

Windows include the token itself: with window *w*, position *p* attends to ``p - w + 1 … p``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from rlcore_inline.kv_cache import KVCache
from rlcore_inline.rounding import position_independent

QUERY_CHUNK = 512
"""Number of queries of a prompt that are processed together where a score matrix or a mask must be built."""

SPAN_STEP = 16
"""The length of the past that is read is a multiple of this: kernels are faster with round sizes."""

INVARIANT_CHUNK = 384
"""Maximum number of positions whose sum a kernel does not divide. MKL divides longer sums, at a position that depends
on their length (measured with torch 2.13 on AVX-512)."""


@dataclass(frozen=True)
class AttentionKind:
    """Variant of a layer's attention.

    Attributes:
        scale: factor of the scores; None is 1/√dim.
        window: number of positions attended to; None attends to all.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2); None leaves them unchanged.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


@dataclass
class PrefillStep:
    """A forward pass over prompts ``[N, S]``, padded on the right.

    Attributes:
        cache: cache to write to; None writes nothing.
        rows: rows ``[N]`` of the cache.
    """

    cache: KVCache | None = None
    rows: torch.Tensor | None = None

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the layer's keys and values ``[N, heads, S, dim]``."""
        if self.cache is not None and self.rows is not None:
            self.cache.write_prompts(layer, self.rows, keys, values)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kind: AttentionKind,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend causally: queries ``[N, heads, S, dim]`` to results of that shape.

        Keys and values have the layer's number of key heads. Padding follows every real token, so the causal mask
        excludes it.
        """
        length = query.shape[2]
        window = kind.window if kind.window is not None and kind.window < length else None
        if window is None and kind.softcap is None and sinks is None:
            grouped = query.shape[1] != key.shape[1]
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=kind.scale, enable_gqa=grouped)
        outputs = []
        for start in range(0, length, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, length)
            first = 0 if window is None else max(0, start - window + 1)
            positions = torch.arange(start, stop, device=query.device)[:, None]
            columns = torch.arange(first, stop, device=query.device)
            seen = columns <= positions
            if window is not None:
                seen &= columns > positions - window
            part = query[:, :, start:stop].unflatten(1, (key.shape[1], -1))
            mask = _additive(seen, query.dtype)
            output = _attend(part, key[:, :, None, first:stop], value[:, :, None, first:stop], mask, kind, sinks)
            outputs.append(output.flatten(1, 2))
        return torch.cat(outputs, dim=2)


@dataclass
class DecodeStep:
    """A forward pass over one new token per row, at position ``positions[r]`` of row *r*.

    Attributes:
        positions: ``[R]`` int64, or longer: entries after the first ``rows`` are padding that attends to nothing.
        longest: largest position, known on the host.
        rows: R; None takes all ``positions``.
        invariant: make the bits of a row's result independent of the length of the other rows.
    """

    cache: KVCache
    positions: torch.Tensor
    longest: int
    rows: int | None = None
    invariant: bool = False
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _indices: dict[int, torch.Tensor] = field(default_factory=dict)
    _pieces: dict[int | None, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.span = min(-(-(self.longest + 1) // SPAN_STEP) * SPAN_STEP, self.cache.width)
        self._count = len(self.positions) if self.rows is None else self.rows
        self._row_positions = self.positions[: self._count]

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new ``[R, heads, dim]`` and return the layer's keys and values ``[R, heads, span, dim]``."""
        key, value = key[: self._count], value[: self._count]
        heads = key.shape[1]
        if heads not in self._indices:
            self._indices[heads] = self.cache.flat_index(self._row_positions, heads)
        keys, values = self.cache.flat(layer)
        keys.index_copy_(0, self._indices[heads], key.reshape(-1, key.shape[-1]))
        values.index_copy_(0, self._indices[heads], value.reshape(-1, value.shape[-1]))
        return self.cache.view(layer, self._count, self.span)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        kind: AttentionKind,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the past: queries ``[R, heads, dim]`` to results of that shape; the result of padding is 0.

        Query heads that share a key head become query positions of one attention, so that keys are read once.
        """
        folded = query[: self._count].unflatten(1, (keys.shape[1], -1))
        mask = self._mask(kind.window, query.dtype)
        if kind.softcap is not None or sinks is not None:
            spread = _attend(folded[:, :, :, None], keys[:, :, None], values[:, :, None], mask[:, :, None], kind, sinks)
            output = spread.flatten(1, 3)
        elif self.invariant and self.span > INVARIANT_CHUNK:
            output = _attend_by_chunks(folded, keys, values, self._chunks(kind.window, mask), kind.scale).flatten(1, 2)
        else:
            output = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=kind.scale).flatten(1, 2)
        padding = len(query) - self._count
        return output if not padding else torch.cat([output, output.new_zeros(padding, *output.shape[1:])])

    def _chunks(self, window: int | None, mask: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Divide ``mask`` into pieces of `INVARIANT_CHUNK` positions, each with the rows ``[R, 1, 1]`` it hides."""
        if window not in self._pieces:
            pieces = [piece.contiguous() for piece in mask.split(INVARIANT_CHUNK, dim=-1)]
            self._pieces[window] = [(piece, (piece == float("-inf")).all(-1)) for piece in pieces]
        return self._pieces[window]

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return ``[R, 1, 1, span]``: 0 where a row may attend, -inf elsewhere."""
        if window is not None and window > self.longest:
            window = None
        if window not in self._masks:
            columns = torch.arange(self.span, device=self.positions.device)
            seen = columns <= self._row_positions[:, None]
            if window is not None:
                seen &= columns > self._row_positions[:, None] - window
            self._masks[window] = _additive(seen, dtype)[:, None, None]
        return self._masks[window]


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _attend_by_chunks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunks: list[tuple[torch.Tensor, torch.Tensor]],
    scale: float | None,
) -> torch.Tensor:
    """Attend to fixed chunks of the past and merge results ``[R, heads, Q, dim]`` by the sums of their exponentials.

    A chunk in which a row sees nothing changes none of the row's bits. torch's CPU kernel is called directly because
    the public function does not return the sums. For a row that sees nothing the kernel returns 0 instead of -inf.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: torch.Tensor | None = None
    total: torch.Tensor | None = None
    for index, (mask, blind) in enumerate(chunks):
        span = slice(index * INVARIANT_CHUNK, (index + 1) * INVARIANT_CHUNK)
        result, lse = kernel(query, keys[:, :, span], values[:, :, span], 0.0, False, attn_mask=mask, scale=scale)
        lse = lse.masked_fill_(blind, float("-inf"))
        if output is None or total is None:
            output, total = result, lse
            continue
        largest = torch.maximum(total, lse)
        before, here = (position_independent(torch.exp, part - largest) for part in (total, lse))
        both = before + here
        output = (output * before[..., None] + result * here[..., None]).div_(both[..., None])
        total = largest + position_independent(torch.log, both)
    assert output is not None, "there are no chunks"
    return output


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    kind: AttentionKind,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with an explicit score matrix; queries are ``[N, key heads, group, Q, dim]``.

    ``sinks`` (gpt-oss) are one more score per query head, which takes part in the softmax and has no value.
    """
    if kind.softcap is None and sinks is None:
        heads, group = query.shape[1:3]
        keys, values = (grid.expand(-1, -1, group, -1, -1).flatten(1, 2) for grid in (keys, values))
        output = scaled_dot_product_attention(query.flatten(1, 2), keys, values, attn_mask=mask, scale=kind.scale)
        return output.unflatten(1, (heads, group))
    scale = kind.scale if kind.scale is not None else query.shape[-1] ** -0.5
    scores = query @ keys.transpose(-1, -2) * scale
    if kind.softcap is not None:
        scores = torch.tanh(scores / kind.softcap) * kind.softcap
    scores = (scores + mask).float()
    if sinks is not None:
        column = sinks.view(1, *query.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1).float()
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]  # shift allowed: without the sinks
    else:
        weights = scores.softmax(-1)
    return weights.to(query.dtype) @ values
