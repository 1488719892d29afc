"""Saving while training goes on: a copy in host memory, and a thread that writes it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from rlcore.background import in_background
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_fsdp import checkpoint

# Where threads compete for cores, training goes before writing; whoever waits for the writer leaves it the core.
_NICENESS = 10


class BackgroundSave:
    """The saves of one engine, one at a time.

    Its buffers (as large as this rank's weights and optimizer states; pinned beside CUDA) stay for the next save.
    """

    def __init__(self, rank: int, world: int) -> None:
        self._rank = rank
        self._world = world
        self._buffers: dict[str, torch.Tensor] = {}
        self.written: dict[str, FileRecord] = {}  # by the last save that has ended
        self._running: tuple[Path, checkpoint.Part, Mapping[str, Any], Future[FileRecord]] | None = None

    def start(self, path: Path, part: checkpoint.Part, facts: Mapping[str, Any]) -> None:
        """Copy ``part`` and begin to write it to the folder ``path``; see `checkpoint.complete` for ``facts``."""
        if self._running is not None:
            raise CheckpointError(f"cannot save to {path}: finish_save has not been called for {self._running[0]}")
        copy = checkpoint.Part(self._copied(part.tensors), part.rows, part.random)
        writing = in_background(lambda: checkpoint.write_part(path, copy, self._rank), "save", _NICENESS)
        self._running = (path, copy, facts, writing)

    def done(self) -> bool:
        return self._running is None or self._running[-1].done()

    def finish(self) -> dict[str, FileRecord]:
        """Wait for all ranks; the files of this one, or nothing if they have been asked for.

        Collective, on the calling thread: the writing one never communicates.

        Raises:
            CheckpointError: a rank could not write.
        """
        if self._running is None:
            written, self.written = self.written, {}
            return written
        (path, part, facts, writing), self._running = self._running, None
        outcome: FileRecord | CheckpointError
        try:
            outcome = writing.result()
        except CheckpointError as error:
            outcome = error
        except Exception as error:
            outcome = CheckpointError(f"rank {self._rank}: {type(error).__name__}: {error}")
        return checkpoint.complete(path, part, outcome, facts, self._rank, self._world)

    def _copied(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``tensors`` in the buffers, complete when this returns."""
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in tensors}
        cuda = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=bool(cuda))
            buffer.copy_(tensor, non_blocking=True)
        for device in cuda:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._buffers)
