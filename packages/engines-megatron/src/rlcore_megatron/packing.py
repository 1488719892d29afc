"""Packed rows: one sequence after another, divided over context-parallel ranks, and the positions of their outputs.

Without context parallelism a row is the sequences themselves. With it, every sequence is padded to a multiple of
``2 · cp`` tokens and cut into ``2 · cp`` chunks, of which rank *r* works on chunks *r* and ``2 · cp − 1 − r``: early
tokens attend to few keys and late ones to many, and so every rank computes the same amount of attention. Under sequence
parallelism a filler sequence makes the tokens of a rank divisible among its tensor-parallel ranks. Padding follows the
tokens of its sequence, where it has no effect under causal attention; no output is computed from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlcore.batch import Batch, state_positions, token_positions
from rlcore.engines import ForwardRequest
from rlcore.engines.settings import Head
from rlcore_kit.training.micro_batches import columns_at
from rlcore_megatron.parallel import Parallel

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class PackedRow:
    """The input of one forward pass, on its device.

    Attributes:
        tokens: ``[1, T / cp]`` int64, this context-parallel rank's part of the padded row.
        attention: boundaries of the sequences in the padded row.
        rows: ``[P]`` int64, positions in ``tokens`` of the states from which outputs are computed.
        columns: ``[P]`` int64, positions of these outputs among the ``total`` tokens of the micro-batch.
        targets: ``[P]`` int64, the tokens at ``columns``.
        total: tokens of the micro-batch, without padding.
        inputs: ``[P, ...]`` entries at ``columns`` of the batch's columns that outputs are computed from.
    """

    tokens: torch.Tensor
    attention: PackedSeqParams
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    total: int
    inputs: dict[str, torch.Tensor]


def pack(
    micro: Batch,
    head: Head,
    parallel: Parallel,
    sequence_parallel: bool,
    device: torch.device,
    request: ForwardRequest,
) -> PackedRow:
    """Pack a micro-batch that is on the CPU; an empty one becomes a row of padding without outputs."""
    from megatron.core.packed_seq_params import PackedSeqParams

    mask = micro.flat("loss_mask") if "loss_mask" in micro else None
    tokens, total = micro.flat("tokens"), micro.total_tokens
    columns = token_positions(micro.lengths, mask, head=head)
    lengths = [length for length in micro.lengths.tolist() if length]
    padded = _padded_lengths(lengths, parallel, sequence_parallel)
    starts = torch.tensor([0, *padded]).cumsum(0)
    # position of every token in the padded row
    sequence = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    first = torch.tensor([0, *lengths]).cumsum(0)
    position = torch.arange(total) - first[sequence] + starts[sequence]
    row = torch.zeros(int(starts[-1]), dtype=torch.int64)
    row[position] = tokens
    states = position[state_positions(columns, head=head)]
    if parallel.cp > 1:
        local = _chunks_of_rank(padded, parallel.cp, parallel.cp_rank)
        index = torch.full((len(row),), -1)
        index[local] = torch.arange(len(local))
        states, row = index[states], row[local]
        columns, states = columns[states >= 0], states[states >= 0]
    boundaries = starts.to(device, torch.int32)
    attention = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries if parallel.cp > 1 else None,
        cu_seqlens_kv_padded=boundaries if parallel.cp > 1 else None,
        max_seqlen_q=max(padded),
        max_seqlen_kv=max(padded),
    )
    inputs = {name: values.to(device) for name, values in columns_at(micro, columns, request).items()}
    return PackedRow(
        row[None].to(device),
        attention,
        states.to(device),
        columns.to(device),
        tokens[columns].to(device),
        total,
        inputs,
    )


def _padded_lengths(lengths: list[int], parallel: Parallel, sequence_parallel: bool) -> list[int]:
    unit = 2 * parallel.cp if parallel.cp > 1 else 1
    padded = [-(-length // unit) * unit for length in lengths]
    divisor = parallel.cp * (parallel.tp if sequence_parallel else 1)
    filler = 0 if padded else unit
    while (sum(padded) + filler) % divisor:
        filler += unit
    return [*padded, filler] if filler else padded


def _chunks_of_rank(lengths: list[int], cp: int, rank: int) -> torch.Tensor:
    """Return the positions in the padded row of the tokens that context-parallel ``rank`` works on."""
    parts, start = [], 0
    for length in lengths:
        chunk = length // (2 * cp)
        first, last = start + rank * chunk, start + (2 * cp - 1 - rank) * chunk
        parts += [torch.arange(first, first + chunk), torch.arange(last, last + chunk)]
        start += length
    return torch.cat(parts)


def gathered_order(lengths: list[int], cp: int) -> torch.Tensor:
    """Return where each position of the padded row is in the concatenation of all ranks' parts."""
    return torch.cat([_chunks_of_rank(lengths, cp, rank) for rank in range(cp)]).argsort()
