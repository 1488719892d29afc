"""Weights between Hugging Face's names and Megatron's shards: loaded in slices, exported as a stream of full tensors.

No process ever holds the full model. Loading reads from the files only the slices that this process keeps. Exporting
assembles one tensor after another: over tensor-parallel ranks, from the expert-parallel rank that has it to the others,
from its pipeline stage to the others; so every rank has the same stream, of which two buckets exist at a time.
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

from rlcore.engines import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.checkpoint.base_model import Frozen, frozen, sum_of_bits
from rlcore_kit.model_folder import checks
from rlcore_kit.training.process_group import gather_objects
from rlcore_megatron import quirks
from rlcore_megatron.families.family import EMBEDDING, LM_HEAD, SCORE, Family
from rlcore_megatron.families.weight import share_shape, view
from rlcore_megatron.model_folder import ModelFolder
from rlcore_megatron.parallel import Parallel
from rlcore_megatron.tensor_slices import (
    TensorSlice,
    adapter_name,
    adapter_slices,
    divided_range,
    slices_of_stage,
    tensor_parallel,
    unwrapped,
)

LISTED = 10
"""Maximum number of problems of a model folder that an error lists."""


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
        EngineError: on every rank, if on any rank a tensor is missing, unexpected or has another shape.
    """
    if family.experts(hf_config):
        quirks.define_missing_gemm()
    files, slices, problems = None, [], []
    try:
        files = ModelFolder(Path(folder))
        slices = slices_of_stage(modules, family, hf_config, parallel)
        head = unwrapped(modules[0]).head
        problems = _problems(files, slices, family, hf_config, head, ignored)
    except EngineError as error:
        problems = [str(error)]
    _agree(problems, folder, parallel)
    assert files is not None
    heads = family.heads(hf_config)
    for piece in slices:
        if piece.parameter is None or piece.named.name not in files:
            continue
        share = share_shape(piece.parameter.shape, piece.weight.part, heads)
        where = view(piece.parameter, piece.weight.part, heads)
        dim = piece.weight.split
        if dim is None:
            where.copy_(files.read(piece.named.name).view(where.shape))
            continue
        start, stop = divided_range(piece, share, tensor_parallel(piece, parallel)[1])
        values = files.read(piece.named.name, dim, start, stop)
        if piece.weight.vocabulary:
            where[len(values) :].zero_()
            where[: len(values)].copy_(values)
        else:
            where.copy_(values.view(where.shape))


def _problems(
    files: ModelFolder, slices: Sequence[TensorSlice], family: Family, hf_config: Any, head: str, ignored: Sequence[str]
) -> list[str]:
    scalar = {weight.hf for weight in SCORE}
    known = {named.name for named in family.body(hf_config)}
    needed = known | {piece.named.name for piece in slices} - scalar
    missing = [f"{name} is missing" for name in sorted(needed) if name not in files]
    heads = {LM_HEAD.hf} if head == "policy" else {LM_HEAD.hf} | scalar  # that of the language model may be tied
    unknown = (name for name in files.names if not name.endswith("rotary_emb.inv_freq"))
    unexpected = [f"{name} is unknown" for name in checks.not_ignored(set(unknown) - known - heads, ignored)]
    misshapen = [
        f"{name} has shape {list(files.shape(name))}, not {list(piece.shape)}"
        for piece in slices
        if (name := piece.named.name) in files and files.shape(name) != piece.shape
    ]
    return missing + unexpected + misshapen + _tied_apart(files, hf_config, head)


def _tied_apart(files: ModelFolder, hf_config: Any, head: str) -> list[str]:
    """Report a language-model head in the files whose values differ from those of the embeddings it is tied to."""
    names = (LM_HEAD.hf, EMBEDDING.hf)
    tied = head == "policy" and hf_config.tie_word_embeddings and all(name in files for name in names)
    if not tied or torch.equal(*map(files.read, names)):
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
    """A tensor of the full model and the pipeline stage that has it, on whose ranks ``piece`` is not None."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    stage: int
    piece: TensorSlice | None

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan(pieces: Sequence[TensorSlice], order: Sequence[str], parallel: Parallel) -> list[Planned]:
    """Return the tensors of all stages, of which ``pieces`` are this stage's; all ranks of a pipeline call it.

    Args:
        order: names of all tensors, in the order wanted. Names without a tensor are ignored.
    """
    slices = {piece.named.name: piece for piece in pieces if piece.exported}
    own = [(name, tuple(piece.shape), piece.dtype) for name, piece in slices.items()]
    stages: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [own]
    if parallel.pp > 1:
        stages = [[] for _ in range(parallel.pp)]
        dist.all_gather_object(stages, own, group=parallel.pp_group)
    everything = {
        name: Planned(name, torch.Size(shape), dtype, stage, slices.get(name) if stage == parallel.pp_rank else None)
        for stage, tensors in enumerate(stages)
        for name, shape, dtype in tensors
    }
    return [everything[name] for name in order if name in everything]


def export(
    modules: Sequence[nn.Module],
    family: Family,
    hf_config: Any,
    parallel: Parallel,
    bucket_bytes: int,
    adapters: bool = False,
) -> Iterator[WeightBucket]:
    """Stream full tensors under Hugging Face names on every rank, in the order of transformers' model.

    All ranks iterate to the end. Tied weights are exported once. Tensors that no other process shares are the live
    parameters, not copies. A tensor larger than ``bucket_bytes`` is alone in its bucket.

    Args:
        adapters: export the matrices of adapters, without their scaling, under their names in PEFT's files, and not
            the weights, into which adapters are merged. A scalar head is exported in either case.
    """
    pieces = slices_of_stage(modules, family, hf_config, parallel)
    names = [named.name for named in family.body(hf_config)]
    order = names + [weight.hf for weight in (LM_HEAD, *SCORE)]
    if adapters:
        order = [adapter_name(name, part) for name in names for part in "AB"] + [weight.hf for weight in SCORE]
        pieces = adapter_slices(pieces) + [piece for piece in pieces if piece.weight in SCORE]
    device = next(modules[0].parameters()).device
    sharing = min((size for size in (parallel.tp, parallel.etp) if size > 1), default=0)
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for planned in plan(pieces, order, parallel):
        passing = planned.nbytes // sharing if sharing else 0  # the share of one rank, while the tensor is put together
        if held and size + planned.nbytes + passing > bucket_bytes:
            yield WeightBucket(tuple(held))
            held, size = [], 0
        held.append((planned.name, _full(planned, family, hf_config, parallel, device)))
        size += planned.nbytes
    if held:
        yield WeightBucket(tuple(held))


@torch.no_grad()
def _full(planned: Planned, family: Family, hf_config: Any, parallel: Parallel, device: torch.device) -> torch.Tensor:
    tensor = None
    if (piece := planned.piece) is not None:
        if piece.parameter is not None:
            tensor = _gathered(piece, family, hf_config, parallel)
        if piece.named.expert is not None and parallel.ep > 1:
            owner = _owner(piece.named.expert, family, hf_config, parallel)
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


def _gathered(piece: TensorSlice, family: Family, hf_config: Any, parallel: Parallel) -> torch.Tensor:
    """Assemble a full tensor from the shares of its tensor-parallel ranks, all of which call it.

    Shares are sent rank by rank, so that at most one share exists in addition to the result.
    """
    assert piece.parameter is not None
    heads = family.heads(hf_config)
    shape = share_shape(piece.parameter.shape, piece.weight.part, heads)
    own = view(piece.parameter.detach(), piece.weight.part, heads).reshape(shape)
    if piece.adapter is not None:
        own = piece.adapter.merged(own)
    size, rank, group = tensor_parallel(piece, parallel)
    dim = piece.weight.split
    if dim is None:
        return own
    if size == 1:
        return own[: piece.shape[0]] if piece.weight.vocabulary else own
    full = torch.empty(piece.shape, dtype=own.dtype, device=own.device)
    for source in range(size):
        start, stop = divided_range(piece, shape, source)
        if start == stop:  # only padding
            continue
        target = full.narrow(dim, start, stop - start)
        values = own.narrow(dim, 0, stop - start).contiguous() if source == rank else torch.empty_like(target)
        if source != rank and target.is_contiguous():
            values = target
        dist.broadcast(values, group=group, group_src=source)
        if values is not target:
            target.copy_(values)
    return full


@torch.no_grad()
def base_model(
    modules: Sequence[nn.Module], family: Family, hf_config: Any, parallel: Parallel, dtype: torch.dtype
) -> Frozen:
    """Return the fingerprint of the weights of ``dtype`` that adapters leave frozen; collective.

    A rank counts its part of them, and of copies one.
    """
    heads = family.heads(hf_config)

    def own() -> Iterator[torch.Tensor]:
        for piece in slices_of_stage(modules, family, hf_config, parallel):
            copies = parallel.dp_cp_group if piece.named.expert is None else parallel.expert_dp_group
            size, rank, _ = tensor_parallel(piece, parallel)
            counted = copies.rank() == 0 and (rank == 0 or piece.weight.split is not None)
            if piece.parameter is None or not piece.exported or piece.weight in SCORE or not counted:
                continue
            shape = share_shape(piece.parameter.shape, piece.weight.part, heads)
            share = view(piece.parameter, piece.weight.part, heads).reshape(shape)
            if piece.weight.vocabulary:  # without padding
                start, stop = divided_range(piece, shape, rank) if size > 1 else (0, piece.shape[0])
                share = share[: stop - start]
            yield share

    return frozen(dtype, gather_objects(sum_of_bits(own())))


def _owner(expert: int, family: Family, hf_config: Any, parallel: Parallel) -> int:
    return expert // (family.experts(hf_config) // parallel.ep)
