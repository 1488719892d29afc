"""Which slices of a model folder's tensors this process holds, and in which Megatron parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlcore.errors import EngineError
from rlcore_kit.model_folder.adapters import PREFIX
from rlcore_megatron.families.family import EMBEDDING, LM_HEAD, SCORE, Family, Named
from rlcore_megatron.families.weight import Weight, share_shape
from rlcore_megatron.parallel import Parallel

# Names in TransformerEngine's layers, which include norms in the following matrix and keep all experts in one module.
_IN_TRANSFORMER_ENGINE = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
    (".local_experts.{expert}.linear_fc1.weight", ".linear_fc1.weight{expert}"),
    (".local_experts.{expert}.linear_fc2.weight", ".linear_fc2.weight{expert}"),
)


@dataclass(frozen=True)
class TensorSlice:
    """A tensor of the model folder that belongs to this pipeline stage, and the parameter with this process's share.

    Attributes:
        named: name and layout of the tensor.
        shape: of the full tensor, without padding.
        dtype: of the parameter.
        parameter: this process's share of the Megatron parameter; None for an expert of another process.
        exported: False for a second copy of tied embeddings.
        adapter: the adapter of this layer of transformers (`rlcore_megatron.adapters.Pair`); None without one.
    """

    named: Named
    shape: torch.Size
    dtype: torch.dtype
    parameter: torch.Tensor | None
    exported: bool = True
    adapter: Any = None

    @property
    def weight(self) -> Weight:
        """Layout of the tensor in Megatron's parameter."""
        return self.named.weight


def slices_of_stage(
    modules: Sequence[nn.Module], family: Family, hf_config: Any, parallel: Parallel
) -> list[TensorSlice]:
    """Return the tensors of this pipeline stage, in the order of transformers' model within each chunk.

    Experts of other expert-parallel ranks are included, without a parameter.
    """
    slices = []
    body = list(family.body(hf_config))
    for module in modules:
        module = unwrapped(module)
        parameters = dict(module.named_parameters())
        modules_by_name = dict(module.named_modules())
        numbers = {layer.layer_number - 1: index for index, layer in enumerate(module.decoder.layers)}
        for named in body:
            if named.layer is not None and named.layer not in numbers:
                continue
            local = None if named.layer is None else numbers[named.layer]
            if (piece := _slice_of(named, local, parameters, family, hf_config, parallel)) is not None:
                path = named.weight.megatron.removesuffix(".weight").format(layer=local, expert=None)
                adapter = modules_by_name.get(f"{path}.adapters.{named.weight.part}")
                slices.append(piece if adapter is None else replace(piece, adapter=adapter))
        slices += _head_slices(module, parameters, family, hf_config, parallel)
    return slices


def adapter_name(name: str, part: str) -> str:
    """Return the name in PEFT's files of the matrix ``part``, A or B, of the adapter of the weight ``name``."""
    return f"{PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight"


def adapter_slices(slices: Sequence[TensorSlice]) -> list[TensorSlice]:
    """Return the matrices A and B of the adapters in ``slices``, under their names in PEFT's files."""
    found = []
    for piece in slices:
        if piece.adapter is None or piece.parameter is None:
            continue
        rank, by_inputs = len(piece.adapter.down), piece.weight.split == 1
        for part, split, shape, parameter in (
            ("A", 1 if by_inputs else None, (rank, piece.shape[1]), piece.adapter.down),
            ("B", None if by_inputs else 0, (piece.shape[0], rank), piece.adapter.up),
        ):
            weight = replace(piece.weight, part="entire", split=split)
            named = replace(piece.named, name=adapter_name(piece.named.name, part), weight=weight)
            found.append(TensorSlice(named, torch.Size(shape), parameter.dtype, parameter))
    return found


def _slice_of(
    named: Named,
    layer: int | None,
    parameters: dict[str, nn.Parameter],
    family: Family,
    hf_config: Any,
    parallel: Parallel,
) -> TensorSlice | None:
    """Return the slice of ``named`` in ``parameters``; None if the tensor belongs to another chunk.

    Raises:
        EngineError: the tensor belongs to this chunk but is missing, or the share is no slice of the full tensor.
    """
    heads, weight = family.heads(hf_config), named.weight
    expert, elsewhere = None, False
    if named.expert is not None:
        each = family.experts(hf_config) // parallel.ep
        elsewhere = named.expert // each != parallel.ep_rank
        expert = 0 if elsewhere else named.expert % each  # all experts have the same shape
    parameter = _parameter(weight.megatron, layer, expert, parameters)
    if parameter is None:
        if layer is None:
            return None
        raise EngineError(f"Megatron's layer {named.layer} has no {weight.megatron.format(layer=layer, expert=expert)}")
    if weight.part in ("query", "key", "value") and parameter.shape[0] % ((heads.per_group + 2) * heads.width):
        raise EngineError(
            f"tensor_parallel {parallel.tp} does not divide the {hf_config.num_key_value_heads} key-value heads of "
            f"this {family.name} model"
        )
    shape = list(share_shape(parameter.shape, weight.part, heads))
    if weight.split is not None:
        shape[weight.split] *= parallel.etp if named.expert is not None else parallel.tp
    if weight.vocabulary:
        shape[0] = hf_config.vocab_size
    return TensorSlice(named, torch.Size(shape), parameter.dtype, None if elsewhere else parameter)


def _head_slices(
    module: Any, parameters: dict[str, nn.Parameter], family: Family, hf_config: Any, parallel: Parallel
) -> list[TensorSlice]:
    output = parameters.get(LM_HEAD.megatron)
    if output is None:
        return []
    if module.head != "policy":
        return [
            TensorSlice(Named(weight.hf, weight), parameter.shape, parameter.dtype, parameter)
            for weight in SCORE
            if (parameter := parameters.get(weight.megatron)) is not None
        ]
    tied = module.share_embeddings_and_output_weights  # on the last of several stages, which has its own copy
    named = Named(EMBEDDING.hf if tied else LM_HEAD.hf, LM_HEAD)
    piece = _slice_of(named, None, parameters, family, hf_config, parallel)
    assert piece is not None
    return [TensorSlice(named, piece.shape, piece.dtype, piece.parameter, exported=not tied)]


def _parameter(
    name: str, layer: int | None, expert: int | None, parameters: dict[str, nn.Parameter]
) -> nn.Parameter | None:
    """Return the parameter by its name in Megatron's local layers, or else in those of TransformerEngine."""
    for own, theirs in (("", ""), *_IN_TRANSFORMER_ENGINE):
        if (
            own in name
            and (found := parameters.get(name.replace(own, theirs).format(layer=layer, expert=expert))) is not None
        ):
            return found
    return None


def unwrapped(module: Any) -> Any:
    """Return the ``GPTModel`` inside of the wrappers for data parallelism and precision."""
    while hasattr(module, "module"):
        module = module.module
    return module


def tensor_parallel(piece: TensorSlice, parallel: Parallel) -> tuple[int, int, dist.ProcessGroup]:
    """Return size, rank and process group of the processes that share a tensor."""
    if piece.named.expert is not None:
        return parallel.etp, parallel.etp_rank, parallel.etp_group
    return parallel.tp, parallel.tp_rank, parallel.tp_group


def divided_range(piece: TensorSlice, share: torch.Size, rank: int) -> tuple[int, int]:
    """Return start and end of a tensor-parallel rank's share of the divided dimension, without padding."""
    assert piece.weight.split is not None
    length, end = share[piece.weight.split], piece.shape[piece.weight.split]
    return min(rank * length, end), min((rank + 1) * length, end)
