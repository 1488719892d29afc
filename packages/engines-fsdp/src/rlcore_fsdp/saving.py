"""Saving and loading an engine: what a checkpoint holds, writing it in the background, and restoring it.

An engine that trains adapters saves only these. The frozen weights come from the model folder; the checkpoint stores a
fingerprint of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlcore.engines import LoRASettings
from rlcore.engines.settings import Head
from rlcore.errors import CheckpointError
from rlcore_fsdp import checkpoint, sharding
from rlcore_fsdp.checkpoint import Manifest
from rlcore_fsdp.host_copy import HostCopy
from rlcore_fsdp.lora import adapted_layers, trained_parameters
from rlcore_fsdp.weights import named_weights
from rlcore_kit.checkpoint import base_model, random_states, rank_files
from rlcore_kit.checkpoint.background_save import BackgroundSave
from rlcore_kit.checkpoint.base_model import Frozen, Lora, check_base_model, sum_of_bits
from rlcore_kit.checkpoint.rank_files import MOMENTS, RankPart
from rlcore_kit.training.process_group import gather_objects, number_of_ranks, own_rank


class Saving:
    """The checkpoints of one engine, one at a time. Parameters are shards while a method runs.

    Args:
        lora: the adapters that are trained; None if all weights are.
        dtype: precision of the forward pass, in which frozen weights are compared.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        head: Head,
        lora: LoRASettings | None,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._head: Head = head
        self._lora = None if lora is None else Lora(rank=lora.rank, alpha=lora.alpha)
        self._dtype = dtype
        self._rank = own_rank()
        self._host_copy = HostCopy()
        self._background: BackgroundSave[RankPart] = BackgroundSave(self._rank, gather_objects)
        self.done, self.finish = self._background.done, self._background.finish

    def save(self, path: Path, schedule_step: int) -> None:
        """Write a checkpoint before returning; collective."""
        self._background.save(path, *self._collect(schedule_step))

    def start(self, path: Path, schedule_step: int) -> None:
        """Copy this rank's part to host memory and begin to write it; collective."""
        self._background.check_idle(path)
        part, manifest = self._collect(schedule_step)
        self._background.start(path, replace(part, tensors=self._host_copy.of(part.tensors)), manifest)

    def load(self, path: Path) -> int | None:
        """Restore the weights and, if there is an optimizer, its states and the random states; collective.

        Returns:
            the step of the learning-rate schedule; None without an optimizer.

        Raises:
            CheckpointError: on all ranks, before anything is changed.
        """
        weights = {f"weight/{name}": tensor for name, tensor in kept_weights(self._model)}
        frozen, error = self._frozen, None
        try:
            manifest = rank_files.read_manifest(path, Manifest, optimizer=self._optimizer is not None)
            check_base_model(path, (manifest.lora, manifest.frozen), (self._lora, frozen))
            checkpoint.check_shapes(path, manifest, weights)
            wanted = {name: checkpoint.row_range(tensor, self._rank) for name, tensor in weights.items()}
            adam = self._adam_steps(manifest)
            wanted |= {f"{moment}/{name}": wanted[f"weight/{name}"] for name in adam for moment in MOMENTS}
            rank_files.check_files(path, manifest, self._rank, number_of_ranks())
            values = checkpoint.read(path, manifest, wanted)
            states = rank_files.read_random_states(path, manifest, self._rank)
        except CheckpointError as problem:
            error = problem
        rank_files.agree(error, path, gather_objects)  # from here on nothing fails
        for name, tensor in weights.items():
            sharding.local(tensor).copy_(values[name])
        if self._optimizer is None:
            return None
        restore_adam_states(self._model, self._optimizer, adam, values)
        random_states.restore(states)
        return manifest.schedule_step

    def _adam_steps(self, manifest: Manifest) -> dict[str, float]:
        """Return the steps of the moments that this engine restores, by weight."""
        if self._optimizer is None:
            return {}
        trained = {name for name, _ in trained_parameters(self._model)}
        return {name: step for name, step in manifest.adam_steps.items() if name in trained}

    def _collect(self, schedule_step: int) -> tuple[RankPart, Callable[..., Manifest]]:
        """Return what this rank writes, as live views, and what makes the manifest of all ranks."""
        adam = adam_states(self._model, self._optimizer)
        tensors = {f"weight/{name}": tensor for name, tensor in kept_weights(self._model)}
        tensors |= {f"{moment}/{name}": state[moment] for name, state in adam.items() for moment in MOMENTS}
        manifest = partial(
            Manifest,
            head=self._head,
            lora=self._lora,
            frozen=self._frozen,
            optimizer=self._optimizer is not None,
            schedule_step=schedule_step,
            adam_steps={name: float(state["step"]) for name, state in adam.items()},
            shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
        )
        return checkpoint.rank_part(tensors, self._rank), manifest

    @cached_property
    def _frozen(self) -> Frozen | None:
        """The weights that checkpoints do not hold, None if they hold all; collective."""
        if self._lora is None:
            return None
        return base_model.frozen(self._dtype, gather_objects(base_model_sum(self._model)))


def kept_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights (shards under FSDP) that a checkpoint holds: all, or adapters and what is trained with them."""
    if any(True for _ in adapted_layers(model)):
        return ((name, parameter.detach()) for name, parameter in trained_parameters(model))
    return named_weights(model)


def base_model_sum(model: nn.Module) -> int:
    """Return the sum of the bits of this rank's rows of the weights that checkpoints do not hold."""
    kept = {name for name, _ in kept_weights(model)}
    own = (checkpoint.row_range(tensor, own_rank()) for name, tensor in named_weights(model) if name not in kept)
    return sum_of_bits(rows.local for rows in own if rows.writes)


def adam_states(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, torch.Tensor]]:
    """Return the optimizer's states by the names of the parameters; none before the first step."""
    if optimizer is None:
        return {}
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def restore_adam_states(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Mapping[str, float], values: Mapping[str, torch.Tensor]
) -> None:
    """Replace all states of ``optimizer`` by this rank's rows of the moments in ``values``."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, step in steps.items():
        parameter = parameters[name]
        state: dict[str, Any] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        for moment, tensor in state.items():
            sharding.local(tensor).copy_(values[f"{moment}/{name}"])
        state["step"] = torch.tensor(step, dtype=torch.float32, device=sharding.local(parameter).device)
        optimizer.state[parameter] = state
