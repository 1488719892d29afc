"""Saving and loading an engine: what a checkpoint holds, writing it in the background, and restoring it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase

from rlcore.engines import LoRASettings
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint import random_states, rank_files
from rlcore_kit.checkpoint.background_save import BackgroundSave
from rlcore_kit.checkpoint.base_model import Frozen, Lora, check_base_model
from rlcore_kit.checkpoint.rank_files import MOMENTS, RankPart, rank_file
from rlcore_kit.training.process_group import gather_objects
from rlcore_megatron import torch_dist
from rlcore_megatron.adapters import is_kept
from rlcore_megatron.checkpoint import Manifest, Reader
from rlcore_megatron.modules import PackedGPT
from rlcore_megatron.optimizer import Optimization
from rlcore_megatron.parallel import Parallel
from rlcore_megatron.settings import CheckpointFormat
from rlcore_megatron.sharded_state import LocalParameter, adam_step, local_parameters, other_states, restore_moments
from rlcore_megatron.torch_dist import TorchDistPart

_MEGATRONS_NAMES = {"weight": "optimizer.state.param."} | {kind: f"optimizer.state.{kind}." for kind in MOMENTS}


class Saving:
    """The checkpoints of one engine, one at a time.

    Args:
        files_format: format of the checkpoints that it writes; it reads all.
        lora: the adapters that are trained, which alone are in checkpoints (with a scalar head); None: all weights.
        base_model: returns the fingerprint of the frozen weights, the same whenever it is called; collective.
    """

    def __init__(
        self,
        modules: Sequence[PackedGPT],
        optimization: Optimization | None,
        parallel: Parallel,
        files_format: CheckpointFormat,
        lora: LoRASettings | None = None,
        base_model: Callable[[], Frozen] | None = None,
    ) -> None:
        self._modules = modules
        self._optimization = optimization
        self._parallel = parallel
        self._format = files_format
        self._lora = None if lora is None else Lora(rank=lora.rank, alpha=lora.alpha)
        self._base_model = base_model
        own = (rank_files.write_part, rank_files.complete)
        steps = (torch_dist.write, torch_dist.complete) if files_format == torch_dist.BACKEND else own
        self._background: BackgroundSave[Any] = BackgroundSave(parallel.rank, gather_objects, *steps)
        self.done, self.finish = self._background.done, self._background.finish

    def start(self, path: Path, schedule_step: int) -> None:
        """Copy this rank's part to host memory and begin to write it; collective."""
        self._background.check_idle(path)
        self._background.start(path, *self._collect(path, schedule_step))

    def save(self, path: Path, schedule_step: int) -> None:
        """Write a checkpoint before returning; collective."""
        self._background.check_idle(path)
        self._background.save(path, *self._collect(path, schedule_step))

    def load(self, path: Path) -> int | None:
        """Restore the weights and, if there is an optimizer, its states and the random states; collective.

        Returns:
            the step of the learning-rate schedule; None without an optimizer.

        Raises:
            CheckpointError: on all ranks, before anything is changed.
        """
        parallel, error = self._parallel, None
        local, frozen = self._kept(), self._frozen
        shapes = _shapes(local)
        try:
            manifest = rank_files.read_manifest(path, Manifest, optimizer=self._optimization is not None)
            check_base_model(path, (manifest.lora, manifest.frozen), (self._lora, frozen))
            rank_files.check_shapes(path, manifest.shapes, shapes)
            rank_files.check_files(path, manifest, parallel.rank, parallel.world)
            reader = Reader(path, manifest)
            step = manifest.adam_step if self._optimization is not None else 0.0
            kinds = ("weight", *MOMENTS) if step else ("weight",)
            values = [{kind: _read(reader, kind, one) for kind in kinds} for one in local]
            states = rank_files.read_random_states(path, manifest, parallel.rank)
        except CheckpointError as problem:
            error = problem
        rank_files.agree(error, path, gather_objects)  # from here on nothing fails
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
        random_states.restore(states)
        return manifest.schedule_step

    @cached_property
    def _frozen(self) -> Frozen | None:
        return None if self._lora is None or self._base_model is None else self._base_model()

    def _kept(self) -> list[LocalParameter]:
        """Return the parameters that checkpoints hold."""
        local = local_parameters(self._modules, self._optimization, self._parallel)
        if self._lora is None:
            return local
        named = (pair for module in self._modules for pair in module.named_parameters())
        kept = {id(parameter) for name, parameter in named if is_kept(name, self._modules[0].head)}
        return [one for one in local if id(one.parameter) in kept]

    def _collect(self, path: Path, schedule_step: int) -> tuple[RankPart | TorchDistPart, Callable[..., Manifest]]:
        """Copy what this rank writes; return that, and what makes the manifest of all ranks. Collective."""
        local = self._kept()
        shapes = _shapes(local)
        step = adam_step(self._optimization) if self._optimization is not None else 0.0
        step = max(gather_objects(step))  # a rank may have no element of any parameter
        manifest = partial(
            Manifest,
            files_format=self._format,
            optimizer=self._optimization is not None,
            adam_step=step,
            schedule_step=schedule_step,
            shapes=shapes,
            lora=self._lora,
            frozen=self._frozen,
        )
        states, text = random_states.collect()
        kinds = ("weight", *MOMENTS) if step else ("weight",)
        if self._format == torch_dist.BACKEND:
            described, keys = _in_megatrons_terms(local, kinds)
            described += other_states(self._modules)
            own = RankPart(states, [], text)
            return torch_dist.plan(path, described, keys, schedule_step, own, gather_objects), manifest
        blocks = []
        for one, kind, tensor in _share(local, kinds):
            for block in one.blocks(tensor):
                name = f"{kind}/{block.key}@{','.join(map(str, block.offset))}"
                states[name] = _copy(block.data)
                blocks.append(((rank_file(self._parallel.rank), name), f"{kind}/{block.key}", block.offset))
        return RankPart(states, blocks, text), manifest


def _share(local: Sequence[LocalParameter], kinds: Sequence[str]) -> Iterator[tuple[LocalParameter, str, torch.Tensor]]:
    """Yield what this rank writes of each parameter, in its shape; collective. Weights are those of the optimizer."""
    for number, one in enumerate(local):
        target = number % one.copies.size()  # the copies share the work
        for kind in kinds:
            tensor = one.assembled(kind, target)
            if tensor is not None and one.writes:
                yield one, kind, tensor


def _in_megatrons_terms(
    local: Sequence[LocalParameter], kinds: Sequence[str]
) -> tuple[list[ShardedBase], dict[str, str]]:
    """Return copies of this rank's share as Megatron describes them, and the manifest's keys by Megatron's keys.

    The names of optimizer states are those of Megatron's ``fully_reshardable`` format. They include the weights that
    the optimizer updates, which the engine reads; the model's weights are written in addition, for Megatron's tools.
    """
    described: list[ShardedBase] = []
    keys: dict[str, str] = {}
    for one, kind, tensor in _share(local, kinds):
        prefix = _MEGATRONS_NAMES[kind] if one.main is not None else ""
        described.append(one.described(_copy(tensor), prefix))
        keys |= {prefix + block.key: f"{kind}/{block.key}" for block in one.blocks(tensor)}
        if kind == "weight" and prefix:
            described.append(one.described(_copy(one.parameter), ""))
    return described, keys


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _shapes(local: Sequence[LocalParameter]) -> dict[str, list[int]]:
    """Return the global shapes of all weights; collective. Padded ones have no first dimension here."""
    own: dict[str, list[int]] = {}
    for one in local:
        for block in one.blocks(one.parameter.data):
            own[block.key] = list(block.shape[1:] if block.padded else block.shape)
    merged: dict[str, list[int]] = {}
    for shapes in gather_objects(own):
        merged |= shapes
    return dict(sorted(merged.items()))


def _read(reader: Reader, kind: str, one: LocalParameter) -> torch.Tensor:
    """Read a weight in the shape of the parameter, or this rank's flat share of a moment, to the CPU."""
    dtype = torch.float32 if kind != "weight" or one.main is not None else one.parameter.dtype
    tensor = torch.empty(one.parameter.shape, dtype=dtype)
    for block in one.blocks(tensor):
        reader.fill(f"{kind}/{block.key}", block.offset, block.data, block.padded)
    return tensor if kind == "weight" else tensor.view(-1)[one.start : one.stop].clone()
