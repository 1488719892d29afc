"""The forward pass: packed tokens in, one number per requested token out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlcore.engines import ForwardRequest, OutputLayer
from rlcore.engines.settings import Head
from rlcore_fsdp.attention import Packing
from rlcore_kit.training.logprob_head import LogitsRule
from rlcore_kit.training.policy_outputs import PolicyHead, policy_outputs


class PackedModel(nn.Module):
    """A Hugging Face model and its head, called on packed rows.

    It is the FSDP root: parameters outside the decoder layers (embeddings, final norm, head) are gathered during
    `forward`. The model is always in evaluation mode: with dropout the trained policy would not be the one that
    generated, and importance ratios would be noise.

    Attributes:
        others: output layers of other models (`rlcore.engines.TrainEngine.hold_output_layer`), on the device.
    """

    def __init__(self, model: PreTrainedModel, head: Head, logits_chunk: int | None) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.logits_chunk = logits_chunk
        self.rule = logits_rule(model.config.get_text_config())
        self.others: dict[str, OutputLayer] = {}

    def forward(
        self,
        tokens: torch.Tensor,
        packing: Packing,
        states: torch.Tensor,
        targets: torch.Tensor,
        request: ForwardRequest,
        columns: Mapping[str, torch.Tensor] = MappingProxyType({}),
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the requested outputs, each ``[P]`` or ``[P, ...]``.

        Args:
            tokens: ``[T]`` int64.
            states: ``[P]`` int64, positions in ``tokens`` of the states from which the outputs are computed
                (`rlcore.batch.alignment`).
            targets: ``[P]`` int64, the tokens that the outputs describe.
            columns: ``[P, ...]``, entries of ``request.columns`` of these tokens.
            noise: ``[T, hidden]``, added to the embeddings; None adds nothing.
        """
        given: dict[str, torch.Tensor] = {"input_ids": tokens[None]}
        if noise is not None:
            embeddings = self.model.get_input_embeddings()(tokens[None])
            given = {"inputs_embeds": embeddings + noise.to(embeddings.dtype)}
        hidden = self.model.base_model(
            **given, position_ids=packing.position_ids, use_cache=False, packing=packing
        ).last_hidden_state[0]
        hidden = hidden.index_select(0, states)
        if self.head == "policy":
            layer = self.model.get_output_embeddings()
            head = PolicyHead(layer.weight, layer.bias, self.rule, self.logits_chunk, others=self.others)
            return policy_outputs(hidden, head, targets, columns, request)
        score: Any = self.model.score
        weight = score.weight.float()
        values = hidden.float() @ (weight.T if len(weight) > 1 else weight[0])
        return {"values": values if score.bias is None else values + score.bias.float()}


def logits_rule(config: Any) -> LogitsRule:
    """Return how the architecture processes its logits, from the configuration fields that transformers uses."""
    scale = 1.0
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale = float(factor)
    elif (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale = 1 / float(divisor)
    return LogitsRule(scale, getattr(config, "final_logit_softcapping", None))  # Gemma 2 and later


@contextmanager
def training_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Set the training mode of ``modules`` themselves, not of the modules inside of them, while the context lasts."""
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False
