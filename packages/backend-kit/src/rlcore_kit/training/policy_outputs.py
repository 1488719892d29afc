"""The outputs of a policy head that a request asks for, from the hidden states of the tokens that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from rlcore.engines import ForwardRequest, OutputLayer
from rlcore.errors import EngineError
from rlcore_kit.training.divergence_head import FrozenHead, divergence, top_logprobs
from rlcore_kit.training.logprob_head import LogitsRule, VocabularyShard, logprobs_and_entropy


@dataclass(frozen=True)
class PolicyHead:
    """The head of this process's policy.

    Attributes:
        weight: ``[vocabulary, hidden]``, or this tensor-parallel rank's rows without padding.
        chunk: tokens whose logits exist at a time; None bounds their memory.
        others: output layers of other models, by name (`hold`).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    rule: LogitsRule
    chunk: int | None
    shard: VocabularyShard | None = None
    others: Mapping[str, OutputLayer] | None = None

    def rows_within(self, vocabulary: int) -> int:
        """Return how many of this rank's rows belong to the first ``vocabulary`` token ids."""
        return min(len(self.weight), max(vocabulary - (self.shard.first if self.shard else 0), 0))

    def within(self, vocabulary: int | None) -> PolicyHead:
        """Return the head for the first ``vocabulary`` token ids."""
        if vocabulary is None:
            return self
        rows = self.rows_within(vocabulary)
        return replace(self, weight=self.weight[:rows], bias=None if self.bias is None else self.bias[:rows])


def policy_outputs(
    states: torch.Tensor,
    head: PolicyHead,
    targets: torch.Tensor,
    columns: Mapping[str, torch.Tensor],
    request: ForwardRequest,
) -> dict[str, torch.Tensor]:
    """Compute the outputs ``[P]`` or ``[P, ...]`` that ``request`` names.

    Args:
        states: ``[P, hidden]``.
        targets: ``[P]`` int64, the tokens that the states predict.
        columns: ``[P, ...]``, entries of ``request.columns`` for the same tokens.
    """
    wanted, found = set(request.outputs), dict[str, torch.Tensor]()
    within = head.within(request.vocabulary)
    if wanted & {"logprobs", "entropy", "candidate_logprobs"}:
        ids = targets[:, None]
        if "candidate_logprobs" in wanted:
            ids = torch.cat([ids, columns[request.candidates or ""]], -1)
        logprobs, entropy = logprobs_and_entropy(
            states,
            within.weight,
            within.bias,
            ids,
            temperature=request.temperature,
            rule=head.rule,
            chunk=head.chunk,
            with_entropy="entropy" in wanted,
            unrounded="candidate_logprobs" in wanted,
            shard=head.shard,
        )
        found |= {"logprobs": logprobs[:, 0], "candidate_logprobs": logprobs[:, 1:]}  # shift allowed: columns
        if entropy is not None:
            found["entropy"] = entropy
    if wanted & {"top_ids", "top_logprobs"}:
        found["top_ids"], found["top_logprobs"] = top_logprobs(
            states.detach(),
            within.weight.detach(),
            within.bias,
            request.top_k,
            temperature=request.temperature,
            rule=head.rule,
            chunk=head.chunk,
            shard=head.shard,
        )
    if "states" in wanted:
        found["states"] = states.detach()
    if "divergence" in wanted:
        found["divergence"] = _divergence(states, head, columns, request)
    return {name: found[name] for name in request.outputs}


def _divergence(
    states: torch.Tensor, head: PolicyHead, columns: Mapping[str, torch.Tensor], request: ForwardRequest
) -> torch.Tensor:
    comparison = request.comparison
    assert comparison is not None  # `check_request`
    layer = (head.others or {}).get(comparison.layer)
    if layer is None:
        raise EngineError(f"the engine holds no output layer {comparison.layer!r} to compare with: hold_output_layer")
    within = head.within(comparison.vocabulary)
    rows = len(within.weight)
    bias = None if layer.bias is None else layer.bias[:rows]
    other = FrozenHead(layer.weight[:rows], bias, LogitsRule(layer.scale, layer.cap))
    return divergence(
        states,
        within.weight,
        within.bias,
        columns[comparison.states].to(layer.weight.dtype),
        other,
        comparison.terms,
        temperature=request.temperature,
        rule=head.rule,
        chunk=head.chunk,
        shard=head.shard,
    )


def shard_of(layer: OutputLayer, shard: VocabularyShard | None, device: torch.device) -> OutputLayer:
    """Return ``layer``, or this rank's rows of it, on ``device``."""
    first, last = (0, None) if shard is None else (shard.first, shard.first + shard.size)
    bias = None if layer.bias is None else layer.bias[first:last].to(device)
    return replace(layer, weight=layer.weight[first:last].to(device), bias=bias)
