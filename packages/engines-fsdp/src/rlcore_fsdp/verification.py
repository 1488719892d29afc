"""Check that the packed forward pass of a model computes what transformers computes for each sequence alone.

Architectures differ in ways that no configuration field shows: attention sinks, scaled logits, layers that mix
sequences, position embeddings that depend on the longest sequence. Every model is checked once when it is loaded, on
short sequences packed together with one that has the last positions of the model.
"""

from __future__ import annotations

import torch

from rlcore.batch import state_positions, token_positions
from rlcore.engines import ForwardRequest
from rlcore.errors import EngineError
from rlcore_fsdp.attention import IMPLEMENTATION, Kernel, Packing
from rlcore_fsdp.packed_model import PackedModel
from rlcore_kit.model_folder.length import longest_position, rope_boundary

TESTED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose forward pass the tests compare with transformers: only packing is checked here."""
_LENGTHS = (11, 7)
_FAR_LENGTH = 5
_UNKNOWN_POSITIONS = 4096


@torch.no_grad()
def verify_packing(
    root: PackedModel, kernel: Kernel, device: torch.device, dtype: torch.dtype, max_length: int | None
) -> None:
    """Raise EngineError if packing changes what the model computes; collective where parameters are sharded.

    Args:
        dtype: precision of the forward pass.
        max_length: maximum sequence length of the run; None if unknown.
    """
    rows = _rows(root, device)
    together = _packed(root, kernel, device, rows, _last_position(root, max_length))
    alone = torch.cat([_packed(root, kernel, device, [row]) for row in rows])
    # in 16 bits packing changes log-probs of unlikely tokens by some hundredths; an error changes them by nats
    _compare(root, together, alone, 1e-4 if dtype == torch.float32 else 0.15, "those of the sequences alone")


@torch.no_grad()
def verify_values(root: PackedModel, kernel: Kernel, device: torch.device) -> None:
    """Raise EngineError if log-probs of a policy are not those of transformers; parameters are full, on ``device``."""
    model, rows = root.model, _rows(root, device)
    model.set_attn_implementation("eager")
    plain = []
    for row in rows:
        positions = token_positions(torch.tensor([len(row)])).to(device)
        states = model(input_ids=row[None], use_cache=False).logits[0].index_select(0, state_positions(positions))
        plain.append(states.float().log_softmax(-1).gather(-1, row[positions, None]).squeeze(-1))
    model.set_attn_implementation(IMPLEMENTATION)
    allowed = 1e-4 if model.dtype == torch.float32 else 5e-2
    _compare(root, _packed(root, kernel, device, rows), torch.cat(plain), allowed, "those of transformers")


def _rows(root: PackedModel, device: torch.device) -> list[torch.Tensor]:
    vocabulary = root.model.config.get_text_config().vocab_size
    return [torch.arange(length, device=device) * 7 % min(vocabulary, 97) for length in _LENGTHS]


def _last_position(root: PackedModel, max_length: int | None) -> int:
    """Return the maximum sequence length that the check must cover."""
    config = root.model.config
    boundary = rope_boundary(config)
    if boundary is not None:
        return boundary[1]
    known = [length for length in (max_length, longest_position(config)) if length is not None]
    return min(known, default=_UNKNOWN_POSITIONS)


def _packed(
    root: PackedModel, kernel: Kernel, device: torch.device, rows: list[torch.Tensor], last_position: int | None = None
) -> torch.Tensor:
    """Compute outputs of ``rows`` in one packed row, after which a sequence ends at ``last_position`` if given."""
    positions = token_positions(torch.tensor([len(row) for row in rows]), head=root.head)
    first = None
    if last_position is not None:
        first = (*(0 for _ in rows), max(last_position - _FAR_LENGTH, 0))
        rows = [*rows, rows[0][:_FAR_LENGTH]]
    packing = Packing(tuple(map(len, rows)), kernel, device, first)
    request = ForwardRequest(("logprobs",) if root.head == "policy" else ("values",))
    outputs: dict[str, torch.Tensor] = root(torch.cat(rows), packing, positions.to(device), request)
    return outputs[request.outputs[0]]


def _compare(root: PackedModel, ours: torch.Tensor, expected: torch.Tensor, allowed: float, what: str) -> None:
    difference = float((ours - expected).abs().mean())
    if root.head != "policy":  # values have any scale
        allowed *= max(1.0, float(expected.abs().mean()))
    if not difference < allowed:
        raise EngineError(
            f"{type(root.model).__name__} is not supported: packed outputs differ from {what} by {difference:.2g} on "
            "average"
        )
