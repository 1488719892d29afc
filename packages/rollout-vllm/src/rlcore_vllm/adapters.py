"""Update of a running model's LoRA adapters in place; the base weights stay.

Every request names one adapter, the policy's. It exists from the start, and has no effect until the first update. vLLM
(0.32) reads adapters from files only; its manager in the worker, which accepts tensors, has no public name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch

from rlcore.errors import EngineError

NUMBER = 1
"""Id of the adapter in vLLM."""
NAMED = 3
"""Maximum number of unknown modules that an error names."""


def lora_arguments(rank: int | None) -> dict[str, Any]:
    """Return vLLM's engine arguments for one adapter of ``rank``.

    Raises:
        EngineError: the policy has no adapters, or their rank exceeds vLLM's maximum.
    """
    from vllm.config.lora import MaxLoRARanks

    if rank is None:
        raise EngineError(
            "rollout.vllm.enable_lora: the policy trains full weights; have it train adapters (actor.fsdp.lora), or "
            "set enable_lora to false"
        )
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


def begin_with_none(model_runner: Any) -> None:
    """Install an adapter of zeros, which has no effect."""
    manager = _manager(model_runner)
    _replace(manager, manager.create_dummy_lora(NUMBER, 1, {}))


class AdapterReload:
    """One update of all adapters of the model: `load` any number of times, then `finish` or `cancel`.

    Names and scaling are those of `rlcore.engines.TrainEngine.export_adapters`.
    """

    def __init__(self, model_runner: Any) -> None:
        self._manager = _manager(model_runner)
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
            NUMBER,
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
    manager.remove_adapter(NUMBER)
    manager.add_adapter(adapter)
    manager.activate_adapter(NUMBER)
