"""Checkpoints in Megatron's own format ``torch_dist``, which Megatron's tools read: `megatron.core.dist_checkpointing`.

Megatron plans them: what each rank writes, under which names, and that every element is written once. A thread of the
engine writes. In addition there are the files of `rlcore_kit.checkpoint.rank_files`: the random states, and a manifest
with the location of each block in Megatron's files. The engine reads by this manifest and never reads ``.metadata``:
that is a pickle, which executes the code that it contains.
"""

from __future__ import annotations

import io
import os
import pickle
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import CheckpointingException, ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint import rank_files
from rlcore_kit.checkpoint.json_file import Count, FileName
from rlcore_kit.checkpoint.rank_files import Gather, RankManifest, RankPart, file_record
from rlcore_kit.checkpoint.tensor_file import flush
from rlcore_megatron.blocks import SavedBlock, overlap

BACKEND, VERSION = "torch_dist", 1

InBucket = tuple[FileName, Count, Count, list[Count]]
"""A file of Megatron, offset and length in bytes there, and the shape of the tensor."""

_BY_RANK_0 = ("common.pt", ".metadata", "metadata.json")


@dataclass(frozen=True)
class TorchDistPart:
    """What one rank writes.

    Attributes:
        buckets: Megatron's plan: the name of each file, and its contents: tensors, or other states as bytes.
        keys: keys of global tensors in the manifest by those in Megatron's files; tensors without one are not in it.
        own: random states, which are written to a separate file.
        writer, metadata: complete the plan (on rank 0).
        written: results of `_write_bucket`, which `write` appends.
    """

    buckets: Sequence[tuple[str, Sequence[tuple[Any, torch.Tensor | io.BytesIO]]]]
    keys: Mapping[str, str]
    own: RankPart
    writer: Any
    metadata: Metadata | None
    written: list[tuple[WriteResult, list[int]]] = field(default_factory=list)


def plan(
    path: Path, states: Sequence[ShardedBase], keys: Mapping[str, str], step: int, own: RankPart, gather: Gather
) -> TorchDistPart:
    """Plan to write ``states``, which are on the CPU and do not change any more, to ``path``; collective.

    Args:
        keys: see `TorchDistPart`.
        step: step of the learning-rate schedule; Megatron calls it the iteration.
        own: see `TorchDistPart`.

    Raises:
        CheckpointError: the folder cannot be written; on all ranks.
    """
    error = None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        error = CheckpointError(f"cannot write {path}: {problem.strerror or problem}")
    rank_files.agree(error, path, gather, "written")
    strategy = _PlanOnly(BACKEND, VERSION)
    with _without_manager():
        try:
            dist_checkpointing.save(
                {"states": list(states), "iteration": step, "checkpoint_version": 3.0},
                str(path),
                sharded_strategy=strategy,
                async_sharded_save=True,
            )
        except (OSError, RuntimeError, CheckpointingException) as problem:
            raise CheckpointError(f"checkpoint {path} could not be written: {problem}") from problem
    buckets = [(name, [*others, *tensors]) for _, name, (others, tensors) in strategy.writer.write_buckets]
    return TorchDistPart(buckets, keys, own, strategy.writer, strategy.metadata)


def write(path: Path, part: TorchDistPart, rank: int) -> dict[str, FileRecord]:
    """Write the files that ``part`` plans and flush them to disk; not collective.

    Raises:
        CheckpointError: names the file.
    """
    records = rank_files.write_part(path, part.own, rank)
    for name, items in part.buckets:
        file = path / name
        try:
            part.written.extend(_write_bucket(file, items))
            records[name] = file_record(file)
        except (OSError, RuntimeError) as problem:  # torch's writer raises the latter too
            raise CheckpointError(f"rank {rank}: cannot write {file}: {problem}") from problem
    return records


def complete(
    path: Path,
    part: TorchDistPart,
    written: Mapping[str, FileRecord] | CheckpointError,
    manifest: Callable[..., RankManifest],
    rank: int,
    gather: Gather,
) -> dict[str, FileRecord]:
    """Add Megatron's metadata and then the manifest, once all ranks have written; see `rank_files.complete`."""
    failed = isinstance(written, CheckpointError)
    results = gather(None if failed else [result for result, _ in part.written])
    if rank == 0 and not isinstance(written, CheckpointError) and None not in results:
        try:
            part.writer.finish(part.metadata, results)
            save_config(CheckpointingConfig(BACKEND, VERSION), str(path))
            for name in _BY_RANK_0:
                flush(path / name)
            written = {**written, **{name: file_record(path / name) for name in _BY_RANK_0}}
        except OSError as problem:
            written = CheckpointError(f"rank 0: cannot write to {path}: {problem.strerror or problem}")
    own = replace(part.own, description=list(_blocks(part)))
    return rank_files.complete(path, own, written, manifest, rank, gather)


def read_overlap(
    folder: Path, where: InBucket, start: Sequence[int], offset: Sequence[int], size: torch.Size
) -> tuple[torch.Tensor, tuple[slice, ...]] | None:
    """Read the overlap of a saved block with a wanted one.

    Args:
        where: location of the saved block.
        start: offset of the saved block in the global tensor.
        offset, size: the wanted block.

    Returns:
        the values, and their slices in the wanted block; None if the blocks do not overlap.

    Raises:
        OSError, RuntimeError, UnpicklingError: the file is missing or damaged.
    """
    name, begin, length, shape = where
    both = overlap(start, shape, offset, size)
    if both is None:
        return None
    with (folder / name).open("rb") as file:
        file.seek(begin)
        content = file.read(length)
    if len(content) != length:
        raise pickle.UnpicklingError("it is too short")
    tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return tensor.view(shape)[both[0]], both[1]


def _blocks(part: TorchDistPart) -> Iterator[SavedBlock]:
    """Yield the location, key and offset of each block that is in the manifest."""
    for result, shape in part.written:
        if result.index.fqn in part.keys:
            stored = result.storage_data
            where = (stored.relative_path, stored.offset, stored.length, shape)
            yield where, part.keys[result.index.fqn], tuple(result.index.offset or ())


class _PlanOnly(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's strategy without the writing.

    megatron-core 0.16.1 writes from processes that it forks from one with many threads, and finishes with collectives
    that never return if one rank cannot write.
    """

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Sequence[Any]) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


@contextmanager
def _without_manager() -> Iterator[None]:
    """Keep megatron-core 0.16.1 from spawning a process for a queue of results while it plans.

    That process would import the main module of the program a second time.
    """
    module: Any = filesystem_async
    before, module._results_queue = module._results_queue, queue.SimpleQueue()
    try:
        yield
    finally:
        module._results_queue = before


def _write_bucket(
    file: Path, items: Sequence[tuple[Any, torch.Tensor | io.BytesIO]]
) -> Iterator[tuple[WriteResult, list[int]]]:
    """Write ``items``; yield the location of each, and the shape of its block of the global tensor."""
    with file.open("wb") as stream:
        for item, content in items:
            begin, shape = stream.tell(), []
            if isinstance(content, torch.Tensor):
                torch.save(content, stream)
                sizes, offset = item.tensor_data.chunk.sizes, item.index.offset
                shape = [1] * (len(offset) - len(sizes)) + list(sizes)
            else:
                stream.write(content.getbuffer())
            length = stream.tell() - begin
            yield WriteResult(item.index, length, _StorageInfo(file.name, begin, length)), shape
        stream.flush()
        os.fsync(stream.fileno())
