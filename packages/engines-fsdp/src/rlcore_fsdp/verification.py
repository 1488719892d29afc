"""Does a model's packed forward pass compute what transformers computes for each sequence alone?

Architectures differ in ways no configuration field announces: attention sinks, scaled logits, layers that look across
sequences. Those that the tests cover are trusted; any other is tried once, on two short sequences, when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlcore.engines import ForwardRequest
from rlcore.errors import EngineError
from rlcore_fsdp.attention import IMPLEMENTATION, Kernel, Packing
from rlcore_fsdp.packed_model import PackedModel

TESTED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_LENGTHS = (11, 7)


@torch.no_grad()
def verify(root: PackedModel, kernel: Kernel, device: torch.device) -> None:
    """Raise EngineError if packing changes the result; parameters are whole and on ``device``."""
    model = root.model
    vocabulary = model.config.get_text_config().vocab_size
    rows = [torch.arange(length, device=device) * 7 % min(vocabulary, 97) for length in _LENGTHS]
    request = ForwardRequest(("logprobs",) if root.head == "policy" else ("values",))

    def packed(*sequences: torch.Tensor) -> torch.Tensor:
        lengths = tuple(len(sequence) for sequence in sequences)
        positions = torch.cat([torch.arange(1, length) for length in lengths])
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        positions += torch.tensor(starts).repeat_interleave(torch.tensor(lengths) - 1)
        packing = Packing(lengths, kernel, device)
        return root(torch.cat(sequences), packing, positions.to(device), request)[request.outputs[0]]

    def plain(sequence: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(-1, sequence[1:, None]).squeeze(-1)

    together = packed(*rows)
    alone: Callable[[torch.Tensor], torch.Tensor] = packed
    if root.head == "policy":
        model.set_attn_implementation("eager")
        alone = plain
    expected = torch.cat([alone(row) for row in rows])
    model.set_attn_implementation(IMPLEMENTATION)
    difference = float((together - expected).abs().mean())
    if not difference < (1e-4 if model.dtype == torch.float32 else 5e-2):
        raise EngineError(
            f"{type(model).__name__} is not supported: packed log-probs differ from those of transformers by "
            f"{difference:.2g} on average"
        )
