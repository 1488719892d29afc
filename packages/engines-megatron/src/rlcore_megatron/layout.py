"""Check, before any communication, that the parallel layout divides the model and the number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlcore.errors import EngineError
from rlcore_megatron.settings import MegatronSettings


def check_layout(settings: MegatronSettings, fields: Mapping[str, Any], world: int, model: str) -> None:
    """Check that the sizes of the layout divide the model and the processes.

    Args:
        fields: sizes of the model by the names of Megatron's ``TransformerConfig``.
        world: number of processes.
        model: name of the model in the error.

    Raises:
        EngineError: names every size that does not divide.
    """
    problems = list(_problems(settings, fields, world))
    if problems:
        raise EngineError(
            f"model {model!r} cannot be divided over {world} process{'es' if world > 1 else ''} with this layout: "
            + "; ".join(problems)
        )


def _problems(settings: MegatronSettings, fields: Mapping[str, Any], world: int) -> Iterator[str]:
    tp, pp, vpp = settings.tensor_parallel, settings.pipeline_parallel, settings.virtual_pipeline
    cp, ep = settings.context_parallel, settings.expert_parallel
    etp = settings.expert_tensor_parallel or tp
    if world % settings.model_parallel:
        yield (
            f"tensor_parallel {tp} x pipeline_parallel {pp} x context_parallel {cp} = {settings.model_parallel} does "
            f"not divide the number of processes {world}"
        )
    if world % (etp * ep * pp):
        yield (
            f"expert_tensor_parallel {etp} x expert_parallel {ep} x pipeline_parallel {pp} = {etp * ep * pp} does not "
            f"divide the number of processes {world}"
        )
    heads, groups = fields["num_attention_heads"], fields["num_query_groups"]
    if heads % tp:
        yield f"{heads} attention heads are not divisible by tensor_parallel {tp}"
    elif groups % tp and tp % groups:
        yield f"{groups} key-value heads are neither a multiple nor a divisor of tensor_parallel {tp}"
    elif tp > groups:
        yield f"tensor_parallel {tp} is more than the {groups} key-value heads"
    layers = fields["num_layers"]
    if layers % (pp * vpp):
        chunks = f"pipeline_parallel {pp}" + (f" x virtual_pipeline {vpp}" if vpp > 1 else "")
        yield f"{layers} layers are not divisible by {chunks}"
    experts = fields.get("num_moe_experts")
    dense = fields["ffn_hidden_size"]
    if not experts:
        if ep > 1:
            yield f"expert_parallel is {ep}, but the model has no experts"
        if settings.expert_tensor_parallel is not None:
            yield f"expert_tensor_parallel is {etp}, but the model has no experts"
        if dense % tp:
            yield f"an intermediate size of {dense} is not divisible by tensor_parallel {tp}"
        return
    if experts % ep:
        yield f"{experts} experts are not divisible by expert_parallel {ep}"
    width = fields.get("moe_ffn_hidden_size") or dense
    if width % etp:
        yield f"an expert's intermediate size of {width} is not divisible by expert_tensor_parallel {etp}"
    if tp > 1 and not settings.sequence_parallel:
        yield f"a mixture of experts with tensor_parallel {tp} needs sequence_parallel: true"
