"""Continuous batching: admission of requests, their rows in the cache, and decoding steps.

Every step decodes one token for all running rows. Prompts are prefilled except for their last token, which is then
decoded like any other, so that new prompts, copies of a prompt and preempted requests start in the same way. A request
that is preempted (weights changed, memory is short) keeps its tokens and is prefilled with them when it is admitted
again.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import Protocol

import torch

from rlcore.engines.rollout import FinishReason
from rlcore.errors import EngineError
from rlcore_inline.attention import DecodeStep, PrefillStep
from rlcore_inline.kv_cache import BLOCK, KVCache, LayerShape, whole_blocks
from rlcore_inline.sampling import Sampler
from rlcore_inline.seeds import uniforms
from rlcore_inline.sequence import Sequence

MIN_ROWS = 16
"""Minimum number of rows from which on the kernel of a matrix product, and so every row's sum, does not depend on the
number of rows (MKL's sgemm on AVX-512: 1 row, few rows and 16 or more differ; 6 or 11 suffice for narrow layers)."""
PREFILL_STEP = 32
"""Prompts are padded to a multiple of this length where results must not depend on the other prompts."""


class Decoder(Protocol):
    """A model that reads and writes the cache."""

    shapes: list[LayerShape]

    def prefill(self, tokens: torch.Tensor, step: PrefillStep) -> None:
        """Cache the prompts ``tokens`` ``[N, S]``, padded on the right."""
        ...

    def decode(self, tokens: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """Cache one more token per row, ``[R]``, and return the logits ``[R, V]`` after it."""
        ...


class Scheduler:
    """Owns the waiting and the running requests.

    Args:
        max_running: maximum number of rows.
        prefill_tokens: maximum number of tokens in one prefill, padding included.
        device: device of the computation.
        invariant: make a request's tokens and log-probs bit-identical whatever other requests run
            (`InlineSettings.batch_invariant`). Matrix products have at least `MIN_ROWS` rows, prompts are prefilled
            together with others of the same padded length only, and a preempted request draws its tokens again when it
            is admitted again, because a prefill sums in another order than decoding.
    """

    def __init__(self, max_running: int, prefill_tokens: int, device: torch.device, invariant: bool = False) -> None:
        self.max_running = max_running
        self.prefill_tokens = prefill_tokens
        self.device = device
        self.invariant = invariant
        self.waiting: list[Sequence] = []  # a heap
        self.running: list[Sequence] = []  # by row
        self._sampler: Sampler | None = None  # of the running rows; rebuilt when the rows change
        self._longest = 0  # number of tokens of the longest running request
        # per row: the token to decode next, its position, the start of the random stream, draws taken from it
        self._state = torch.zeros(4, max(max_running, MIN_ROWS), dtype=torch.int64, device=device)

    @property
    def unfinished(self) -> bool:
        """True while any request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Add a request to the waiting ones."""
        heapq.heappush(self.waiting, sequence)

    def remove(self, sequences: Iterable[Sequence], cache: KVCache | None) -> None:
        """Remove requests, waiting or running."""
        gone = set(sequences)
        self.waiting = [sequence for sequence in self.waiting if sequence not in gone]
        heapq.heapify(self.waiting)
        if cache is not None:
            self._vacate([sequence for sequence in self.running if sequence in gone], cache)

    def clear(self) -> list[Sequence]:
        """Remove all requests and return them."""
        forgotten = [*self.running, *self.waiting]
        self.waiting, self.running, self._sampler = [], [], None
        return forgotten

    def evict_all(self) -> None:
        """Preempt all running requests."""
        for sequence in self.running:
            heapq.heappush(self.waiting, sequence)
        self.running, self._sampler = [], None

    @torch.no_grad()
    def step(self, decoder: Decoder, cache: KVCache) -> list[tuple[Sequence, FinishReason]]:
        """Admit requests that fit, decode one token for every row, and return the requests that ended.

        Raises:
            EngineError: the logits are not finite.
        """
        self._admit(decoder, cache)
        self._ensure_capacity(cache)
        rows = len(self.running)
        padded = max(rows, MIN_ROWS) if self.invariant else rows  # padding is what earlier rows left behind
        step = DecodeStep(cache, self._state[1, :padded], self._longest - 1, rows, self.invariant)
        logits = decoder.decode(self._state[0, :padded], step)[:rows]
        token, position, stream, draw = self._state[:, :rows]
        if self._sampler is None:
            self._sampler = Sampler.build(
                [sequence.request.sampling for sequence in self.running], logits.shape[1], self.device
            )
        tokens, logprobs = self._sampler.sample(logits, uniforms(stream, draw))
        token.copy_(tokens)
        position += 1
        draw += 1
        # the only transfer of a step
        host_tokens, host_logprobs = torch.stack([tokens.double(), logprobs.double()]).tolist()
        if not math.isfinite(sum(host_logprobs)):
            raise EngineError(
                "the model's logits are not finite: the weights have diverged or hold NaN; go back to an earlier "
                "checkpoint and lower the learning rate"
            )
        ended: list[tuple[Sequence, FinishReason]] = []
        for sequence, new, logprob in zip(self.running, host_tokens, host_logprobs):
            reason = sequence.append(int(new), logprob)
            if reason is not None:
                ended.append((sequence, reason))
        self._longest += 1
        if ended:
            self._vacate([sequence for sequence, _ in ended], cache)
        return ended

    # --- rows ------------------------------------------------------------------------------------------------------

    def _admit(self, decoder: Decoder, cache: KVCache) -> None:
        """Admit waiting requests to free rows, several together, because a prefill costs as much as a step."""
        worth = min(len(self.waiting), max(1, self.max_running // 16))
        if not self.waiting or (self.running and self.max_running - len(self.running) < worth):
            return
        admitted: list[Sequence] = []
        longest = self._longest if self.running else 0
        final = max((sequence.final_length for sequence in self.running), default=0)
        while self.waiting and len(self.running) + len(admitted) < self.max_running:
            longest, final = max(longest, self.waiting[0].length), max(final, self.waiting[0].final_length)
            rows = len(self.running) + len(admitted) + 1
            if rows > 1 and rows * whole_blocks(min(final, longest * 9 // 8 + BLOCK)) > cache.budget:
                break  # a row would soon be preempted, see _ensure_capacity
            admitted.append(heapq.heappop(self.waiting))
        if not admitted:
            return
        first = len(self.running)
        self.running += admitted
        self._running_changed()
        self._fit(cache, rows_in_use=first)
        for row, sequence in enumerate(admitted, first):
            sequence.row = row
        self._fill(admitted, decoder, cache)
        state = [
            [(s.tokens or s.prompt)[-1] for s in admitted],
            [s.length - 1 for s in admitted],
            [s.stream for s in admitted],
            [len(s.tokens) for s in admitted],
        ]
        self._state[:, first : len(self.running)] = torch.tensor(state, device=self.device)

    def _fill(self, admitted: list[Sequence], decoder: Decoder, cache: KVCache) -> None:
        """Cache the histories of admitted requests: compute each distinct history once, and copy known prompts."""
        first = admitted[0].row
        owners = {
            sequence.prompt[:-1]: sequence.row  # shift allowed: the part that is cached
            for sequence in self.running[:first]
            if not self.invariant or sequence.prefilled == len(sequence.prompt) - 1
        }
        fresh: dict[tuple[int, ...], int] = {}
        copies: list[tuple[int, int, int]] = []
        for sequence in admitted:
            history = sequence.history()
            sequence.prefilled = len(history)
            if not history:
                continue
            if history in owners:
                copies.append((owners[history], sequence.row, len(history)))
            elif history in fresh:
                copies.append((fresh[history], sequence.row, len(history)))
            else:
                fresh[history] = sequence.row
        for chunk in _chunks(sorted(fresh, key=len), self.prefill_tokens, self.invariant):
            width = _padded(len(chunk[-1])) if self.invariant else len(chunk[-1])
            tokens = torch.tensor([[*history, *[0] * (width - len(history))] for history in chunk], device=self.device)
            rows = torch.tensor([fresh[history] for history in chunk], device=self.device)
            decoder.prefill(tokens, PrefillStep(cache, rows))
        if copies:
            source, target, lengths = zip(*copies)
            cache.copy_rows(
                torch.tensor(source, device=self.device), torch.tensor(target, device=self.device), max(lengths)
            )

    def _ensure_capacity(self, cache: KVCache) -> None:
        """Ensure that every row has a position for its next token; preempt the latest requests if necessary."""
        if self._longest <= cache.width:
            return
        if _affordable(cache, len(self.running)) < self._longest:
            keep = cache.budget // whole_blocks(self._longest)
            keep = max(1, min(keep, len(self.running) * 7 // 8))  # capacity for many steps, not for one block
            leaving = sorted(self.running)[keep:]
            self._vacate(leaving, cache)
            for sequence in leaving:
                if self.invariant:
                    sequence.rewind()
                heapq.heappush(self.waiting, sequence)
        self._fit(cache, rows_in_use=len(self.running))

    def _fit(self, cache: KVCache, rows_in_use: int) -> None:
        """Widen the cache so that it holds the running rows, up to their maximum length if memory suffices."""
        rows = len(self.running)
        if self._longest <= cache.width and rows <= cache.rows:
            return
        final = whole_blocks(max(sequence.final_length for sequence in self.running))
        cache.resize(min(final, _affordable(cache, rows)), rows_in_use, min(self._longest, cache.width))

    def _vacate(self, leaving: list[Sequence], cache: KVCache) -> None:
        """Remove requests from their rows, and fill the gaps with the last rows."""
        if not leaving:
            return
        rows = len(self.running) - len(leaving)
        gone = {sequence.row for sequence in leaving}
        movers = [sequence for sequence in self.running[rows:] if sequence.row not in gone]
        gaps = sorted(row for row in gone if row < rows)
        if movers:
            source = torch.tensor([sequence.row for sequence in movers], device=self.device)
            target = torch.tensor(gaps, device=self.device)
            cache.copy_rows(source, target, min(self._longest, cache.width))
            self._state[:, target] = self._state[:, source]
        for row, sequence in zip(gaps, movers, strict=True):
            sequence.row = row
            self.running[row] = sequence
        del self.running[rows:]
        self._running_changed()

    def _running_changed(self) -> None:
        self._sampler = None
        self._longest = max((sequence.length for sequence in self.running), default=0)


def _affordable(cache: KVCache, rows: int) -> int:
    """Return the largest width with which the cache has ``rows`` rows."""
    return cache.budget // rows // BLOCK * BLOCK


def _chunks(histories: list[tuple[int, ...]], maximum: int, invariant: bool) -> list[list[tuple[int, ...]]]:
    """Divide histories, shortest first, into prefills of at most ``maximum`` tokens with little padding.

    If ``invariant``, only histories that are padded to the same length are prefilled together.
    """
    chunks: list[list[tuple[int, ...]]] = []
    used = 0
    for history in histories:
        length = _padded(len(history)) if invariant else len(history)
        size = (len(chunks[-1]) + 1) * length if chunks else 0
        padding = size - used - length
        if not chunks or size > maximum or (padding > 0 if invariant else padding > max(BLOCK * 4, size // 8)):
            chunks.append([])
            used = 0
        chunks[-1].append(history)
        used += length
    return chunks


def _padded(length: int) -> int:
    return -(-length // PREFILL_STEP) * PREFILL_STEP
