"""Check that the packed forward pass of a model computes what transformers computes for each sequence alone.

Architectures differ in ways that no configuration field shows: attention sinks, scaled logits, layers that mix
sequences, position embeddings that depend on the longest sequence. Every model is checked once when it is loaded, on
short sequences packed together with one that has the last positions of the model.
"""

from __future__ import annotations

from warnings import warn

import torch

from rlcore.batch import state_positions, token_positions
from rlcore.engines import ForwardRequest
from rlcore.errors import EngineError, RlcoreWarning
from rlcore_fsdp.attention import IMPLEMENTATION, Kernel, Packing
from rlcore_fsdp.packed_model import PackedModel
from rlcore_fsdp.prefix_sharing import share_prefixes
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
    _compare(root, together, alone, _allowed(dtype), "those of the sequences alone")


@torch.no_grad()
def shares_exactly(root: PackedModel, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether shared prefixes change nothing; warn if they do. Collective where parameters are sharded."""
    base = torch.cat(_rows(root, device) * 2)
    rows = [base, torch.cat([base[:20], base[3:9]]), torch.cat([base[:20], base[3:5], base[:2]]), base[:18]]
    tokens, lengths = torch.cat(rows), [len(row) for row in rows]
    positions = token_positions(torch.tensor(lengths), head=root.head)
    shared = share_prefixes(tokens.cpu(), lengths)
    assert shared is not None
    packing = Packing(shared.runs, kernel, device, shared.first, shared.prefixes)
    states = shared.places[state_positions(positions, head=root.head)].to(device)
    found = _outputs(root, tokens[shared.tokens.to(device)], packing, states, tokens[positions.to(device)])
    alone = torch.cat([_packed(root, kernel, device, [row]) for row in rows])
    difference, allowed = _difference(root, found, alone, _allowed(dtype))
    if not difference < allowed:
        warn(
            f"{type(root.model).__name__} computes prefixes that sequences share differently (outputs differ by "
            f"{difference:.2g} on average), so they are computed for every sequence",
            RlcoreWarning,
            stacklevel=2,
        )
    return difference < allowed


def _allowed(dtype: torch.dtype) -> float:
    # in 16 bits packing changes log-probs of unlikely tokens by some hundredths; an error changes them by nats
    return 1e-4 if dtype == torch.float32 else 0.15


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
    positions = token_positions(torch.tensor([len(row) for row in rows]), head=root.head).to(device)
    first = None
    if last_position is not None:
        first = (*(0 for _ in rows), max(last_position - _FAR_LENGTH, 0))
        rows = [*rows, rows[0][:_FAR_LENGTH]]
    packing, tokens = Packing(tuple(map(len, rows)), kernel, device, first), torch.cat(rows)
    return _outputs(root, tokens, packing, state_positions(positions, head=root.head), tokens[positions])


def _outputs(
    root: PackedModel, tokens: torch.Tensor, packing: Packing, states: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    request = ForwardRequest(("logprobs",) if root.head == "policy" else ("values",))
    outputs: dict[str, torch.Tensor] = root(tokens, packing, states, targets, request)
    return outputs[request.outputs[0]]


def _difference(root: PackedModel, ours: torch.Tensor, expected: torch.Tensor, allowed: float) -> tuple[float, float]:
    """Return the mean difference, and the one that is allowed."""
    scale = 1.0 if root.head == "policy" else max(1.0, float(expected.abs().mean()))  # values have any scale
    return float((ours - expected).abs().mean()), allowed * scale


def _compare(root: PackedModel, ours: torch.Tensor, expected: torch.Tensor, allowed: float, what: str) -> None:
    difference, allowed = _difference(root, ours, expected, allowed)
    if not difference < allowed:
        raise EngineError(
            f"{type(root.model).__name__} is not supported: packed outputs differ from {what} by {difference:.2g} on "
            "average"
        )
