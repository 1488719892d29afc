"""Weights between Hugging Face's names and Megatron's shards: read from files, streamed out whole.

No process ever holds the whole model. Loading reads from the files only the slices that this process keeps. Exporting
puts one tensor after another together: over tensor-parallel ranks, from the expert-parallel rank that has it to the
others, from its pipeline stage to the others; so every rank has the same stream, of which two buckets exist at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlcore.engines import WeightBucket, model_checks
from rlcore.errors import EngineError
from rlcore_megatron import experts
from rlcore_megatron.families.family import EMBEDDING, LM_HEAD, SCORE, Family, Named
from rlcore_megatron.families.weight import Weight, share_shape, view
from rlcore_megatron.parallel import Parallel
from rlcore_megatron.reading import Checkpoint

LISTED = 10
"""Most problems of a checkpoint that an error lists."""

# Names of TransformerEngine's layers, which take norms into the matrix after them and keep all experts in one module.
_IN_TRANSFORMER_ENGINE = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
    (".local_experts.{expert}.linear_fc1.weight", ".linear_fc1.weight{expert}"),
    (".local_experts.{expert}.linear_fc2.weight", ".linear_fc2.weight{expert}"),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint lies in this pipeline stage.

    Attributes:
        shape: of the whole tensor, without padding.
        parameter: this process's share of the Megatron parameter; None for an expert of another process.
        exported: False for a second copy of tied embeddings.
    """

    named: Named
    shape: torch.Size
    dtype: torch.dtype
    parameter: torch.Tensor | None
    exported: bool = True

    @property
    def weight(self) -> Weight:
        return self.named.weight


# --- loading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_pretrained(
    modules: Sequence[nn.Module],
    family: Family,
    hf_config: Any,
    folder: str | Path,
    parallel: Parallel,
    ignored: Sequence[str] = (),
) -> None:
    """Fill the parameters of ``modules`` (this stage's chunks) from a model folder; all ranks call it.

    The scalar head of a value or score model stays as it is if the files have none.

    Args:
        ignored: names or patterns of tensors in the files that may be left out.

    Raises:
        EngineError: on every rank, with what is missing, unexpected or of another shape on any.
    """
    if family.experts(hf_config):
        experts.mend()
    checkpoint, placed, problems = None, [], []
    try:
        checkpoint = Checkpoint(Path(folder))
        placed = places(modules, family, hf_config, parallel)
        head = unwrapped(modules[0]).head
        problems = _problems(checkpoint, placed, family, hf_config, head, ignored)
    except EngineError as error:
        problems = [str(error)]
    _agree(problems, folder, parallel)
    assert checkpoint is not None
    heads = family.heads(hf_config)
    for place in placed:
        if place.parameter is None or place.named.name not in checkpoint:
            continue
        share = share_shape(place.parameter.shape, place.weight.part, heads)
        where = view(place.parameter, place.weight.part, heads)
        dim = place.weight.split
        if dim is None:
            where.copy_(checkpoint.read(place.named.name).view(where.shape))
            continue
        start, stop = _range(place, share, _tensor_parallel(place, parallel)[1])
        values = checkpoint.read(place.named.name, dim, start, stop)
        if place.weight.vocabulary:
            where[len(values) :].zero_()
            where[: len(values)].copy_(values)
        else:
            where.copy_(values.view(where.shape))


def _problems(
    checkpoint: Checkpoint, placed: Sequence[Place], family: Family, hf_config: Any, head: str, ignored: Sequence[str]
) -> list[str]:
    scalar = {weight.hf for weight in SCORE}
    known = {named.name for named in family.body(hf_config)}
    needed = known | {place.named.name for place in placed} - scalar
    missing = [f"{name} is missing" for name in sorted(needed) if name not in checkpoint]
    heads = {LM_HEAD.hf} if head == "policy" else {LM_HEAD.hf} | scalar  # that of the language model may be tied
    unknown = (name for name in checkpoint.names if not name.endswith("rotary_emb.inv_freq"))
    unexpected = [f"{name} is unknown" for name in model_checks.not_ignored(set(unknown) - known - heads, ignored)]
    misshapen = [
        f"{name} has shape {list(checkpoint.shape(name))}, not {list(place.shape)}"
        for place in placed
        if (name := place.named.name) in checkpoint and checkpoint.shape(name) != place.shape
    ]
    return missing + unexpected + misshapen + _tied_apart(checkpoint, hf_config, head)


def _tied_apart(checkpoint: Checkpoint, hf_config: Any, head: str) -> list[str]:
    """A language-model head in the files that is another tensor than the embeddings it is tied to."""
    names = (LM_HEAD.hf, EMBEDDING.hf)
    tied = head == "policy" and hf_config.tie_word_embeddings and all(name in checkpoint for name in names)
    if not tied or torch.equal(*map(checkpoint.read, names)):
        return []
    return [f"{LM_HEAD.hf} has other values than {EMBEDDING.hf}, to which tie_word_embeddings ties it"]


def _agree(problems: list[str], folder: str | Path, parallel: Parallel) -> None:
    """Raise the same error on all ranks if there is a problem on any."""
    if parallel.world > 1:
        everyones: list[list[str]] = [[]] * parallel.world
        dist.all_gather_object(everyones, problems)
        problems = list(dict.fromkeys(problem for own in everyones for problem in own))
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise EngineError(f"weights of {str(folder)!r} do not fit: {'; '.join(problems[:LISTED])}{more}")


# --- exporting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A tensor of the whole model, and the pipeline stage that has it (as ``place`` on that stage's ranks)."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    stage: int
    place: Place | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan(modules: Sequence[nn.Module], family: Family, hf_config: Any, parallel: Parallel) -> list[Planned]:
    """Every tensor in the order of transformers' model, tied ones once; all ranks of a pipeline call it."""
    placed = {place.named.name: place for place in places(modules, family, hf_config, parallel) if place.exported}
    own = [(name, tuple(place.shape), place.dtype) for name, place in placed.items()]
    stages: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [own]
    if parallel.pp > 1:
        stages = [[] for _ in range(parallel.pp)]
        dist.all_gather_object(stages, own, group=parallel.pp_group)
    everything = {
        name: Planned(name, torch.Size(shape), dtype, stage, placed.get(name) if stage == parallel.pp_rank else None)
        for stage, tensors in enumerate(stages)
        for name, shape, dtype in tensors
    }
    names = [named.name for named in family.body(hf_config)] + [weight.hf for weight in (LM_HEAD, *SCORE)]
    return [everything[name] for name in names if name in everything]


def export(
    modules: Sequence[nn.Module], family: Family, hf_config: Any, parallel: Parallel, bucket_bytes: int
) -> Iterator[WeightBucket]:
    """Stream whole tensors under Hugging Face names on every rank; all ranks iterate to the end.

    Tensors that no other process shares are the live parameters, not copies. A tensor larger than ``bucket_bytes`` has
    a bucket of its own.
    """
    device = next(modules[0].parameters()).device
    sharing = min((size for size in (parallel.tp, parallel.etp) if size > 1), default=0)
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for planned in plan(modules, family, hf_config, parallel):
        passing = planned.nbytes // sharing if sharing else 0  # the share of one rank, while the tensor is put together
        if held and size + planned.nbytes + passing > bucket_bytes:
            yield WeightBucket(tuple(held))
            held, size = [], 0
        held.append((planned.name, _whole(planned, family, hf_config, parallel, device)))
        size += planned.nbytes
    if held:
        yield WeightBucket(tuple(held))


@torch.no_grad()
def _whole(planned: Planned, family: Family, hf_config: Any, parallel: Parallel, device: torch.device) -> torch.Tensor:
    tensor = None
    if (place := planned.place) is not None:
        if place.parameter is not None:
            tensor = _gathered(place, family, hf_config, parallel)
        if place.named.expert is not None and parallel.ep > 1:
            owner = _owner(place.named.expert, family, hf_config, parallel)
            tensor = _broadcast(tensor, planned, parallel.ep_group, owner, device)
    if parallel.pp > 1:
        tensor = _broadcast(tensor, planned, parallel.pp_group, planned.stage, device)
    assert tensor is not None
    return tensor


def _broadcast(
    tensor: torch.Tensor | None, planned: Planned, group: dist.ProcessGroup, source: int, device: torch.device
) -> torch.Tensor:
    if tensor is None:
        tensor = torch.empty(planned.shape, dtype=planned.dtype, device=device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, group=group, group_src=source)
    return tensor


def _gathered(place: Place, family: Family, hf_config: Any, parallel: Parallel) -> torch.Tensor:
    """The whole tensor from the shares of its tensor-parallel ranks, in which all of them take part.

    Rank by rank, so that no more than one share exists besides the result.
    """
    assert place.parameter is not None
    heads = family.heads(hf_config)
    shape = share_shape(place.parameter.shape, place.weight.part, heads)
    own = view(place.parameter.detach(), place.weight.part, heads).reshape(shape)
    size, rank, group = _tensor_parallel(place, parallel)
    dim = place.weight.split
    if dim is None:
        return own
    if size == 1:
        return own[: place.shape[0]] if place.weight.vocabulary else own
    whole = torch.empty(place.shape, dtype=own.dtype, device=own.device)
    for source in range(size):
        start, stop = _range(place, shape, source)
        if start == stop:  # nothing but padding
            continue
        target = whole.narrow(dim, start, stop - start)
        values = own.narrow(dim, 0, stop - start).contiguous() if source == rank else torch.empty_like(target)
        if source != rank and target.is_contiguous():
            values = target
        dist.broadcast(values, group=group, group_src=source)
        if values is not target:
            target.copy_(values)
    return whole


# --- places ----------------------------------------------------------------------------------------------------------


def places(modules: Sequence[nn.Module], family: Family, hf_config: Any, parallel: Parallel) -> list[Place]:
    """The tensors of this pipeline stage, in the order of transformers' model within each chunk.

    Experts of other expert-parallel ranks are among them, without a parameter.
    """
    placed = []
    body = list(family.body(hf_config))
    for module in modules:
        module = unwrapped(module)
        parameters = dict(module.named_parameters())
        numbers = {layer.layer_number - 1: index for index, layer in enumerate(module.decoder.layers)}
        for named in body:
            if named.layer is not None and named.layer not in numbers:
                continue
            local = None if named.layer is None else numbers[named.layer]
            if (place := _place(named, local, parameters, family, hf_config, parallel)) is not None:
                placed.append(place)
        placed += _head_places(module, parameters, family, hf_config, parallel)
    return placed


def _place(
    named: Named,
    layer: int | None,
    parameters: dict[str, nn.Parameter],
    family: Family,
    hf_config: Any,
    parallel: Parallel,
) -> Place | None:
    """None if the tensor is in another chunk.

    Raises:
        EngineError: this chunk should have the tensor, but has not; or its share is not a slice of the whole.
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
    return Place(named, torch.Size(shape), parameter.dtype, None if elsewhere else parameter)


def _head_places(
    module: Any, parameters: dict[str, nn.Parameter], family: Family, hf_config: Any, parallel: Parallel
) -> list[Place]:
    output = parameters.get(LM_HEAD.megatron)
    if output is None:
        return []
    if module.head != "policy":
        return [
            Place(Named(weight.hf, weight), parameter.shape, parameter.dtype, parameter)
            for weight in SCORE
            if (parameter := parameters.get(weight.megatron)) is not None
        ]
    tied = module.share_embeddings_and_output_weights  # on the last of several stages, which has its own copy
    named = Named(EMBEDDING.hf if tied else LM_HEAD.hf, LM_HEAD)
    place = _place(named, None, parameters, family, hf_config, parallel)
    assert place is not None
    return [Place(named, place.shape, place.dtype, place.parameter, exported=not tied)]


def _parameter(
    name: str, layer: int | None, expert: int | None, parameters: dict[str, nn.Parameter]
) -> nn.Parameter | None:
    """The parameter under its name in Megatron's own layers, or in TransformerEngine's."""
    for own, theirs in (("", ""), *_IN_TRANSFORMER_ENGINE):
        if (
            own in name
            and (found := parameters.get(name.replace(own, theirs).format(layer=layer, expert=expert))) is not None
        ):
            return found
    return None


def unwrapped(module: Any) -> Any:
    """The ``GPTModel`` within the wrappers for data parallelism and precision."""
    while hasattr(module, "module"):
        module = module.module
    return module


def _tensor_parallel(place: Place, parallel: Parallel) -> tuple[int, int, dist.ProcessGroup]:
    """Size, rank and group of the processes that share a tensor."""
    if place.named.expert is not None:
        return parallel.etp, parallel.etp_rank, parallel.etp_group
    return parallel.tp, parallel.tp_rank, parallel.tp_group


def _range(place: Place, share: torch.Size, rank: int) -> tuple[int, int]:
    """What a tensor-parallel rank has of the divided dimension; padding is not counted."""
    assert place.weight.split is not None
    length, end = share[place.weight.split], place.shape[place.weight.split]
    return min(rank * length, end), min((rank + 1) * length, end)


def _owner(expert: int, family: Family, hf_config: Any, parallel: Parallel) -> int:
    return expert // (family.experts(hf_config) // parallel.ep)
