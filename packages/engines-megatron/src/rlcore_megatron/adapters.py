"""Low-rank adapters (LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685) of Megatron's parallel linear layers.

There is one pair of matrices, A and B, for each linear layer of transformers, also where Megatron fuses several into
one (query, key and value; gate and up): the adapters are those of PEFT, whatever the layout. Tensor parallelism divides
them as it divides the layer. What ranks exchange has the width of the adapters, not of the layer:

- a column-parallel layer, divided by outputs: A is full and B divided. B's ranks need the full A x, and A the sum of
  their gradients.
- a row-parallel layer, divided by inputs: A is divided and B full. The ranks sum their parts of A x.

Under sequence parallelism a full matrix sees a part of the tokens on each rank, so that its gradient is summed over
ranks.

Importing this module imports megatron-core: on the CPU `rlcore_megatron.cpu_emulation.install` must come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.nn.functional import linear

from rlcore.engines import LoRASettings
from rlcore.errors import EngineError
from rlcore_kit.model_folder.adapters import first_matrix, peft_config
from rlcore_megatron.families.family import Family, Named
from rlcore_megatron.families.weight import Heads, share_shape, view
from rlcore_megatron.parallel import Parallel

ADAPTERS = "adapters"
"""Name of the module with a layer's pairs, by the parts of the layer that they belong to."""


class Pair(nn.Module):
    """This rank's share of the matrices A ``[rank, in]`` and B ``[out, rank]`` of one adapter."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scaling = scaling

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + alpha / rank · B A for this rank's share W ``[out, in]``, computed in fp32."""
        return torch.addmm(weight.float(), self.up.float(), self.down.float(), alpha=self.scaling).to(weight.dtype)


class AdaptedColumn(ColumnParallelLinear):  # type: ignore[misc]
    """A layer divided by outputs, with adapters for some of the layers of transformers that it fuses."""

    heads: Heads
    switched_on = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = nn.ModuleDict()

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Return outputs ``[T, 1, out / ranks]`` and the bias, for ``[T, 1, in]`` or this rank's tokens of it."""
        output, bias = super().forward(input_, *args, **kwargs)
        if self.switched_on and self.adapters:
            self._add(output, input_)
        return output, bias

    def _add(self, output: torch.Tensor, input_: torch.Tensor) -> None:
        pairs: list[tuple[Any, Any]] = list(self.adapters.items())
        inner = linear(input_, torch.cat([pair.down for _, pair in pairs]))
        if self.config.sequence_parallel:
            inner = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        channels = output.movedim(-1, 0)
        for (part, pair), states in zip(pairs, inner.chunk(len(pairs), dim=-1)):
            target = view(channels, part, self.heads)
            target.add_(linear(states, pair.up).movedim(-1, 0).view(target.shape), alpha=pair.scaling)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Describe B as divided by rows, and A as full."""
        described: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return described | _described(self, {".up": 0}, prefix, sharded_offsets, metadata)


class AdaptedRow(RowParallelLinear):  # type: ignore[misc]
    """A layer divided by inputs, with an adapter."""

    switched_on = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = nn.ModuleDict()

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return outputs ``[T, 1, out]``, or this rank's tokens of them, and the bias, for ``[T, 1, in / ranks]``."""
        output, bias = super().forward(input_)
        if self.switched_on and self.adapters:
            pair: Any = self.adapters["entire"]
            inner = linear(input_, pair.down)
            if self.config.sequence_parallel:
                inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
            else:
                inner = reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
            output = torch.add(output, linear(inner, pair.up), alpha=pair.scaling)
        return output, bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Describe A as divided by columns, and B as full."""
        described: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return described | _described(self, {".down": 1}, prefix, sharded_offsets, metadata)


def _described(layer: Any, divided: dict[str, int], prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
    """Describe the adapters of ``layer`` as Megatron does; ``divided`` has the dimensions by the ends of names."""
    own = {name: tensor for name, tensor in layer.state_dict(keep_vars=True).items() if name.startswith(ADAPTERS)}
    axes = {name: axis for name in own for end, axis in divided.items() if name.endswith(end)}
    groups = {"tp_group": layer.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    described: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets, **groups)
    return described


def add_adapters(
    modules: Sequence[Any],
    family: Family,
    hf_config: Any,
    settings: LoRASettings,
    parallel: Parallel,
    seed: int,
) -> None:
    """Add adapters to the layers of this process's chunks, and freeze all else but a scalar head.

    A starts uniform as in the paper's code, from ``seed`` and the layer's name, and B at zero.

    Raises:
        EngineError: the model has no such layers, or they are experts.
    """
    wanted = targets(family, hf_config, settings)
    peft_config(settings, wanted)  # without PEFT adapters could not be exported
    heads = family.heads(hf_config)
    layers = {layer.layer_number - 1: layer for module in modules for layer in module.decoder.layers}
    for module in modules:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith("output_layer.") and module.head != "policy")
        _give_embeddings_a_gradient(module)
    for named in family.body(hf_config):
        if named.layer in layers and _kind(named) in wanted and named.expert is None:
            path = named.weight.megatron.partition("{layer}.")[2].removesuffix(".weight")
            _add(layers[named.layer].get_submodule(path), named, heads, settings, parallel, seed)


def targets(family: Family, hf_config: Any, settings: LoRASettings) -> list[str]:
    """Return the last parts of the names of transformers' layers that get adapters.

    Raises:
        EngineError: one of them is no linear layer of the model, or belongs to experts.
    """
    found = [named for named in family.body(hf_config) if _is_linear(named)]
    known = {_kind(named) for named in found if named.expert is None}
    if settings.target_modules is None and any(named.expert is not None for named in found):
        raise EngineError(
            f"the experts of this {family.name} model cannot have adapters; list the layers to adapt in "
            "lora.target_modules (q_proj, k_proj, v_proj, o_proj …)"
        )
    wanted = set(settings.target_modules or known)
    if missing := sorted(wanted - known):
        raise EngineError(
            f"lora.target_modules names {', '.join(missing)}, but the linear layers of this {family.name} model that "
            f"can have adapters are {', '.join(sorted(known))}"
        )
    return sorted(wanted)


def is_kept(name: str, head: str) -> bool:
    """Return whether a checkpoint of adapters holds the parameter ``name`` of a model with ``head``."""
    return f".{ADAPTERS}." in name or (head != "policy" and name.startswith("output_layer."))


@contextmanager
def switched_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have adapted layers compute W x alone while the context lasts."""
    layers = [
        layer for module in modules for layer in module.modules() if isinstance(layer, AdaptedColumn | AdaptedRow)
    ]
    for layer in layers:
        layer.switched_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.switched_on = True


def _add(layer: Any, named: Named, heads: Heads, settings: LoRASettings, parallel: Parallel, seed: int) -> None:
    weight, by_inputs = layer.weight, isinstance(layer, AdaptedRow)
    rows, columns = share_shape(weight.shape, named.weight.part, heads)
    width = columns * parallel.tp if by_inputs else columns
    down = first_matrix(named.name.removesuffix(".weight"), settings.rank, width, seed)
    if by_inputs:
        down = down.chunk(parallel.tp, dim=1)[parallel.tp_rank]
    place = {"device": weight.device, "dtype": weight.dtype}
    up = torch.zeros(rows, settings.rank, **place)
    pair = Pair(down.to(**place).contiguous(), up, settings.alpha / settings.rank)
    divided, full, dimension = (pair.down, pair.up, 1) if by_inputs else (pair.up, pair.down, 0)
    set_tensor_model_parallel_attributes(divided, True, dimension, 1)
    full.sequence_parallel = layer.config.sequence_parallel  # type: ignore[attr-defined]
    layer.heads = heads
    layer.adapters[named.weight.part] = pair


def _give_embeddings_a_gradient(module: Any) -> None:
    """Let gradients reach adapters through recomputed layers: these need an input that has a gradient."""
    if module.pre_process and module.config.recompute_granularity is not None:
        module.embedding.register_forward_hook(
            lambda _, inputs, states: states.requires_grad_() if torch.is_grad_enabled() else states
        )


def _is_linear(named: Named) -> bool:
    weight = named.weight
    return named.layer is not None and weight.split is not None and weight.hf.endswith(".weight")


def _kind(named: Named) -> str:
    """Return the last part of the name of the layer in transformers; empty if it is no linear layer."""
    return named.name.removesuffix(".weight").rpartition(".")[2] if _is_linear(named) else ""
