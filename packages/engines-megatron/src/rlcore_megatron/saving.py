"""Saving and loading an engine: what goes into a checkpoint, in the background, and how it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from rlcore.background import in_background
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_megatron import checkpoint, random_states
from rlcore_megatron.modules import PackedGPT
from rlcore_megatron.optimizer import MOMENTS, Optimization
from rlcore_megatron.parallel import Parallel
from rlcore_megatron.sharded_state import Local, adam_step, local_parameters, restore_moments

_NICENESS = 5  # training goes first where there are fewer cores than threads


class Saving:
    """The checkpoints of one engine, one at a time."""

    def __init__(self, modules: Sequence[PackedGPT], optimization: Optimization | None, parallel: Parallel) -> None:
        self._modules = modules
        self._optimization = optimization
        self._parallel = parallel
        self._written: dict[str, FileRecord] = {}  # by the last save that has ended
        self._running: tuple[Path, checkpoint.Part, Mapping[str, Any], Future[FileRecord]] | None = None

    def start(self, path: Path, schedule_step: int) -> None:
        """Copy this rank's share to host memory and begin to write it; collective."""
        if self._running is not None:
            raise CheckpointError(f"cannot save to {path}: finish_save has not been called for {self._running[0]}")
        part, facts = self._collect(schedule_step)
        rank = self._parallel.rank
        writing = in_background(lambda: checkpoint.write_part(path, part, rank), "save", _NICENESS)
        self._running = (path, part, facts, writing)

    def done(self) -> bool:
        return self._running is None or self._running[-1].done()

    def finish(self) -> dict[str, FileRecord]:
        """Wait for all ranks; the files of this one, or nothing if they have been asked for. Collective.

        Raises:
            CheckpointError: a rank could not write.
        """
        if self._running is None:
            written, self._written = self._written, {}
            return written
        (path, part, facts, writing), self._running = self._running, None
        outcome: FileRecord | CheckpointError
        try:
            outcome = writing.result()
        except CheckpointError as error:
            outcome = error
        except Exception as error:
            outcome = CheckpointError(f"rank {self._parallel.rank}: {type(error).__name__}: {error}")
        return checkpoint.complete(path, part, outcome, facts, self._parallel.rank)

    def save(self, path: Path, schedule_step: int) -> None:
        """All of it at once; collective."""
        self.start(path, schedule_step)
        self._written = self.finish()

    def load(self, path: Path) -> int | None:
        """Restore weights and, if there is an optimizer, its states and the random ones; collective.

        Returns:
            the schedule's step; None without an optimizer.

        Raises:
            CheckpointError: on all ranks, before anything is changed.
        """
        parallel, error = self._parallel, None
        local = local_parameters(self._modules, self._optimization, parallel)
        shapes = _shapes(local)
        try:
            manifest = checkpoint.read_manifest(path, shapes)
            if self._optimization is not None and not manifest["optimizer"]:
                raise CheckpointError(f"{path} was saved by a frozen engine: it has no optimizer states to go on with")
            checkpoint.check_files(path, manifest, parallel.rank, parallel.world)
            reader = checkpoint.Reader(path, manifest)
            step = manifest["adam_step"] if self._optimization is not None else 0.0
            kinds = ("weight", *MOMENTS) if step else ("weight",)
            values = [{kind: _read(reader, kind, one) for kind in kinds} for one in local]
            states, text = reader.random_states(parallel.rank)
        except CheckpointError as problem:
            error = problem
        checkpoint.agree(error, path)  # from here on nothing fails
        for one, held in zip(local, values):
            weight = held.pop("weight")
            one.parameter.data.copy_(weight)
            if one.main is None:
                continue
            if one.parameter.dtype != torch.float32:
                one.main.data.view(-1).copy_(weight.view(-1)[one.start : one.stop])
            restore_moments(one, held, step)
        if self._optimization is None:
            return None
        random_states.restore(states, text)
        return int(manifest["schedule_step"])

    def _collect(self, schedule_step: int) -> tuple[checkpoint.Part, dict[str, Any]]:
        """Copies of what this rank writes, and facts about the whole."""
        local = local_parameters(self._modules, self._optimization, self._parallel)
        shapes = _shapes(local)
        step = adam_step(self._optimization) if self._optimization is not None else 0.0
        step = max(checkpoint.gather_objects(step))  # a rank may have no element of any parameter
        tensors, text = random_states.collect()
        blocks = []
        for number, one in enumerate(local):
            target = number % one.copies.size()  # the copies share the work
            for kind in ("weight", *MOMENTS) if step else ("weight",):
                tensor = one.whole(kind, target)
                if tensor is None or not one.writes:
                    continue
                for block in one.blocks(tensor):
                    name = f"{kind}/{block.key}@{','.join(map(str, block.offset))}"
                    tensors[name] = block.data.detach().to("cpu", copy=True).contiguous()
                    blocks.append((name, f"{kind}/{block.key}", block.offset))
        facts = {
            "optimizer": self._optimization is not None,
            "adam_step": step,
            "schedule_step": schedule_step,
            "shapes": shapes,
        }
        return checkpoint.Part(tensors, blocks, text), facts


def _shapes(local: Sequence[Local]) -> dict[str, list[int]]:
    """Global shapes of all weights of the model; collective. Padded ones count without their first dimension."""
    own: dict[str, list[int]] = {}
    for one in local:
        for block in one.blocks(one.parameter.data):
            own[block.key] = list(block.shape[1:] if block.padded else block.shape)
    everyones: dict[str, list[int]] = {}
    for shapes in checkpoint.gather_objects(own):
        everyones |= shapes
    return dict(sorted(everyones.items()))


def _read(reader: checkpoint.Reader, kind: str, one: Local) -> torch.Tensor:
    """A weight shaped as the parameter, or this rank's flat share of a moment; on the CPU."""
    dtype = torch.float32 if kind != "weight" or one.main is not None else one.parameter.dtype
    tensor = torch.empty(one.parameter.shape, dtype=dtype)
    for block in one.blocks(tensor):
        reader.fill(f"{kind}/{block.key}", block.offset, block.data, block.padded)
    return tensor if kind == "weight" else tensor.view(-1)[one.start : one.stop].clone()
