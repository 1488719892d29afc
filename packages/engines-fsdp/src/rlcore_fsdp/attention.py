"""Attention over a packed row of sequences, as an attention implementation of transformers.

A micro-batch is one row ``[1, T]`` without padding. No mask of it is built: kernels divide the row by the lengths of
its sequences, which every layer receives as the forward keyword ``packing``. A sequence may continue earlier ones
(`rlcore_fsdp.prefix_sharing`): its queries attend to slices of the row before it, and to the sequence itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlcore.errors import EngineError

IMPLEMENTATION = "rlcore_packed"

Kernel = Literal["sdpa", "varlen", "flash_attention_2"]

# Layer keywords that change the mathematics of attention and that no kernel below computes.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, eq=False)
class Packing:
    """How a packed row divides into sequences.

    Attributes:
        lengths: tokens per sequence, all positive.
        kernel: attention kernel.
        device: device of the row.
        first: position id of each sequence's first token; None if it is 0.
        prefixes: the slices of the row that each sequence continues, together ``first`` tokens; None if none does.
    """

    lengths: tuple[int, ...]
    kernel: Kernel
    device: torch.device
    first: tuple[int, ...] | None = None
    prefixes: tuple[tuple[tuple[int, int], ...], ...] | None = None

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """``[1, T]`` int64, starting again in every sequence."""
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        if self.first is not None:
            starts = starts - torch.tensor(self.first)
        positions = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
        return positions[None].to(self.device)

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """``[B + 1]`` int32."""
        return _boundaries(self.lengths, self.device)

    @cached_property
    def attended(self) -> AttendedKeys:
        """The keys that each sequence attends to."""
        if self.prefixes is None:
            return AttendedKeys(None, self.boundaries, max(self.lengths))
        pieces, lengths, start = list[torch.Tensor](), list[int](), 0
        for prefix, length in zip(self.prefixes, self.lengths):
            slices = [*prefix, (start, start + length)]
            pieces += [torch.arange(*piece) for piece in slices]
            lengths.append(sum(stop - begin for begin, stop in slices))
            start += length
        return AttendedKeys(torch.cat(pieces).to(self.device), _boundaries(lengths, self.device), max(lengths))


@dataclass(frozen=True, eq=False)
class AttendedKeys:
    """The keys of all sequences, one after another.

    Attributes:
        places: of each key in the row, int64; None if sequences attend to themselves alone.
        boundaries: ``[B + 1]`` int32.
        longest: maximum number of keys of a sequence.
    """

    places: torch.Tensor | None
    boundaries: torch.Tensor
    longest: int

    def of(self, row: torch.Tensor) -> torch.Tensor:
        """Return the keys, or values, of ``row`` ``[T, H, D]``."""
        return row if self.places is None else row.index_select(0, self.places)


def _boundaries(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def choose_kernel(requested: str | None, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel for ``requested`` (an ``attn_implementation``), or the fastest correct one for None.

    Raises:
        EngineError: the kernel is unknown, not installed, or does not support the device or precision.
    """
    usable: dict[Kernel, bool] = {
        "flash_attention_2": device.type == "cuda" and dtype != torch.float32 and find_spec("flash_attn") is not None,
        "varlen": device.type == "cuda" and dtype != torch.float32 and _torch_varlen() is not None,
        "sdpa": True,
    }
    if requested is None:
        return next(kernel for kernel, works in usable.items() if works)
    chosen = next((kernel for kernel in usable if kernel == requested), None)
    if chosen is None:
        raise EngineError(
            f"attn_implementation {requested!r} has no packed form here; known: {', '.join(usable)}, or null"
        )
    if not usable[chosen]:
        raise EngineError(
            f"attn_implementation {requested!r} needs CUDA, a 16-bit param_dtype and its library installed; this "
            f"engine computes in {str(dtype).removeprefix('torch.')} on {device.type}"
        )
    return chosen


@cache
def _torch_varlen() -> Any:
    """Return ``varlen_attn`` of torch if it supports grouped queries and windows (torch 2.11 does not), else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"enable_gqa", "window_size"} <= set(inspect.signature(varlen_attn).parameters) else None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each sequence; ``query`` ``[1, H, T, D]`` → ``[1, T, H, D]``; see `Packing`."""
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported or packing is None or dropout:
        what = f"uses {unsupported[0]}" if unsupported else "applies dropout" if dropout else "loses the packing"
        raise EngineError(
            f"{type(module).__name__} {what} in attention, which the packed forward pass does not support"
        )
    if packing.kernel == "sdpa":
        out = _by_sequence(query, key, value, scaling, sliding_window, packing)
    else:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        keys = packing.attended
        row = q, keys.of(k), keys.of(v), packing.boundaries, keys.boundaries, max(packing.lengths), keys.longest
        if packing.kernel == "varlen":
            out = _torch_varlen()(*row, scale=scaling, window_size=window, enable_gqa=True)[None]
        else:
            from flash_attn import flash_attn_varlen_func

            out = flash_attn_varlen_func(*row, softmax_scale=scaling, causal=True, window_size=window)[None]
    return out, None


def _by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    packing: Packing,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    lengths = packing.lengths
    prefixes = packing.prefixes or [()] * len(lengths)
    parts = []
    for q, k, v, prefix in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), prefixes):
        if prefix:
            k, v = _continued(key, prefix, k), _continued(value, prefix, v)
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            ).transpose(1, 2)
        )
    return torch.cat(parts, 1)


def _continued(row: torch.Tensor, prefix: Sequence[tuple[int, int]], own: torch.Tensor) -> torch.Tensor:
    """Return the slices ``prefix`` of ``row`` ``[1, H, T, D]``, and ``own`` after them."""
    return torch.cat([*(row[:, :, slice(*piece)] for piece in prefix), own], 2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return a mask ``[queries, keys]`` of the last tokens of a sequence; None if it is plainly causal.

    Each token attends to itself and to those before it, or the ``window - 1`` nearest of them.
    """
    banded = window is not None and window < keys
    if queries == keys and not banded:
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask.triu(keys - queries + 1 - window) if banded and window is not None else mask


# No mask function is registered under this name, so transformers builds no mask.
AttentionInterface.register(IMPLEMENTATION, packed_attention)
