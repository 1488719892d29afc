"""Update of a running model's LoRA adapters in place; the base weights stay.

Every request names one adapter, the policy's. It exists from the start, and has no effect until the first update. vLLM
(0.32) reads adapters from files only; its manager in the worker, which accepts tensors, has no public name. A server
knows adapters that it has loaded from a folder, so it loads a placeholder first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from rlcore.errors import EngineError

NUMBER = 1
"""Id of the adapter in engines that rlcore starts; servers choose one."""
NAMED = 3
"""Maximum number of unknown modules that an error names."""


def trained_rank(rank: int | None) -> int:
    """Return the rank of the policy's adapters.

    Raises:
        EngineError: it has none.
    """
    if rank is None:
        raise EngineError(
            "rollout.vllm.enable_lora: the policy trains full weights; have it train adapters (actor.fsdp.lora), or "
            "set enable_lora to false"
        )
    return rank


def lora_arguments(rank: int | None) -> dict[str, Any]:
    """Return vLLM's engine arguments for one adapter of ``rank``.

    Raises:
        EngineError: the policy has no adapters, or their rank exceeds vLLM's maximum.
    """
    from vllm.config.lora import MaxLoRARanks

    rank = trained_rank(rank)
    fitting = [maximum for maximum in get_args(MaxLoRARanks) if maximum >= rank]
    if not fitting:
        raise EngineError(
            f"rollout.vllm.enable_lora: the adapters have rank {rank}, and vLLM takes at most "
            f"{max(get_args(MaxLoRARanks))}; lower actor.fsdp.lora.rank, or set enable_lora to false"
        )
    return {"enable_lora": True, "max_lora_rank": min(fitting), "max_loras": 1}


def adapter_request(config: Any) -> Any:
    """Return vLLM's ``LoRARequest`` for requests of an engine with this ``VllmConfig``; None without adapters."""
    if config.lora_config is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", NUMBER, "memory")  # the path is never read


def begin_with_none(model_runner: Any, number: int = NUMBER) -> None:
    """Install an adapter of zeros, which has no effect."""
    manager = _manager(model_runner)
    _replace(manager, manager.create_dummy_lora(number, 1, {}))


def known_adapters(model_runner: Any) -> set[int]:
    """Return the ids of the adapters that the worker has loaded."""
    return set(_manager(model_runner).list_adapters())


def write_placeholder(model_runner: Any, folder: Path) -> None:
    """Write an adapter in PEFT's format that vLLM loads, and that adapts no layer of the model.

    vLLM (0.32) reads the last part of a layer's name, and cannot load an adapter without layers.
    """
    manager = _manager(model_runner)
    fused = manager.packed_modules_mapping
    name = next(part for layer in sorted(manager.supported_lora_modules) for part in fused.get(layer, [layer]))
    config = {"r": 1, "lora_alpha": 1, "target_modules": [name]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    matrices = {f"base_model.model.placeholder.{name}.lora_{part}.weight": torch.zeros(1, 1) for part in "AB"}
    save_file(matrices, folder / "adapter_model.safetensors")


class AdapterReload:
    """One update of all adapters of the model: `load` any number of times, then `finish` or `cancel`.

    Names and scaling are those of `rlcore.engines.TrainEngine.export_adapters`.

    Args:
        number: the adapter's id in vLLM.
    """

    def __init__(self, model_runner: Any, number: int = NUMBER) -> None:
        self._manager = _manager(model_runner)
        self._number = number
        self._tensors: dict[str, torch.Tensor] = {}

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Copy unsharded matrices; the caller may reuse their memory afterwards.

        Raises:
            ValueError: a tensor belongs to no adapter.
        """
        for name, tensor in tensors:
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ValueError(f"vLLM was started with enable_lora and accepts adapters, not {name}")
            self._tensors[name] = tensor.to("cpu", copy=True)

    def finish(self) -> None:
        """Replace the adapters by the loaded ones.

        Raises:
            ValueError: there is none, one lacks a matrix, belongs to no layer of the model, or has too large a rank.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        layers = {name.rpartition(".lora_")[0] for name in self._tensors}
        halves = [layer for layer in layers for part in "AB" if f"{layer}.lora_{part}.weight" not in self._tensors]
        if not layers or halves:
            raise ValueError(f"the update lacks {f'a matrix of {min(halves)}' if halves else 'adapters'}")
        config = self._manager.lora_config
        rank = max(len(tensor) for name, tensor in self._tensors.items() if ".lora_A." in name)
        helper = PEFTHelper(r=rank, lora_alpha=rank, target_modules=[])  # B includes the scaling
        helper.validate_legal(config)
        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            self._number,
            self._tensors,
            helper,
            device="cpu",
            dtype=config.lora_dtype,
            weights_mapper=mapper and mapper.get_rename_mapper(),
        )
        fused = self._manager.packed_modules
        known = {part for name in self._manager.modules for part in fused.get(name, [name])}
        if unknown := sorted(adapter.loras.keys() - known):
            named = ", ".join(unknown[:NAMED]) + (", …" if len(unknown) > NAMED else "")
            raise ValueError(f"vLLM has no layers for {len(unknown)} of the adapters: {named}")
        _replace(self._manager, adapter)

    def cancel(self) -> None:
        """Keep the adapters as they were."""
        self._tensors.clear()


def _manager(model_runner: Any) -> Any:
    return model_runner.lora_manager._adapter_manager


def _replace(manager: Any, adapter: Any) -> None:
    manager.remove_adapter(adapter.id)
    manager.add_adapter(adapter)
    manager.activate_adapter(adapter.id)
