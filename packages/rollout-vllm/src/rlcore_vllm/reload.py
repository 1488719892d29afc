"""Update of a running model's weights in place, with vLLM's layerwise reloading.

Weights have the names of the model folder; vLLM fuses, shards and packs them as at its start, into the same memory. A
layer (a fused one as a unit: q, k and v) is replaced when its last weight has been loaded; only weights of incomplete
layers are copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

NAMED = 3
"""Maximum number of missing layers that an error names."""


class Reload:
    """One update of all weights of ``model``: `load` any number of times, then `finish` or `cancel`.

    Args:
        begun: vLLM itself has begun the update and loads the weights; call `copy_incomplete` instead of `load`.
    """

    def __init__(self, model: nn.Module, model_config: Any, *, begun: bool = False) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._model: Any = model
        self._model_config = model_config
        self._copied: dict[int, weakref.ref[Any]] = {}  # by id, which may be reused once its owner is gone
        if not begun:
            initialize_layerwise_reload(model)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load full tensors by name; the caller may reuse their memory afterwards.

        Raises:
            ValueError: the model has no such name, or the shape differs.
        """
        device = next((tensor.device for _, tensor in tensors), torch.device("cpu"))
        for name, tensor in tensors:
            try:
                self._model.load_weights([(name, tensor)])
            except Exception as error:
                reason = str(error) or type(error).__name__
                raise ValueError(f"vLLM cannot load {name} of shape {list(tensor.shape)}: {reason}") from error
        self.copy_incomplete()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    def finish(self) -> None:
        """Make the model compute with the new weights.

        Raises:
            ValueError: weights are missing; `cancel` then.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        missing, tied = self._not_loaded()
        if missing:
            named = ", ".join(missing[:NAMED]) + (", …" if len(missing) > NAMED else "")
            raise ValueError(f"the weight update lacks weights of {len(missing)} layers: {named}")
        finalize_layerwise_reload(self._model, self._model_config)
        for layer in tied:  # on the CPU, an output layer computes with a packed copy of its tied embedding
            layer.quant_method.process_weights_after_loading(layer)

    def cancel(self) -> None:
        """Restore a model that can be updated again, with old weights in some layers and new ones in others."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():  # finalizing restores a layer's old tensors if nothing was loaded for it
                info.load_numel = 0
                info.loaded_weights.clear()
        finalize_layerwise_reload(self._model, self._model_config)

    def copy_incomplete(self) -> None:
        """Copy the weights of incomplete layers: vLLM keeps references to memory that the caller reuses."""
        for _, info in self._open_layers():
            for _, bound in info.loaded_weights:
                copied = self._copied.get(id(bound))
                if copied is not None and copied() is bound:
                    continue
                for key, value in bound.arguments.items():
                    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                        bound.arguments[key] = value.clone()
                self._copied[id(bound)] = weakref.ref(bound)

    def _open_layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the names of incomplete layers, with vLLM's information on their reload."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for name, layer in self._model.named_modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                yield name, info

    def _not_loaded(self) -> tuple[list[str], list[Any]]:
        """Return names of layers that lack parameters, and layers whose parameters were loaded as another layer's.

        The padding of a vocabulary is never loaded.
        """
        layers: dict[str, Any] = dict(self._model.named_modules())
        waiting = dict(self._open_layers())
        complete: set[int] = set()  # addresses of loaded parameters
        for name, layer in layers.items():
            if name not in waiting:
                complete.update(parameter.data_ptr() for parameter in layer.parameters(recurse=False))
            elif _padded(layer, waiting[name]):
                complete.update(_addresses(waiting[name]))
        missing, tied = [], []
        for name, info in waiting.items():
            if not info.restore_metadata[0] or _padded(layers[name], info) or info.load_numel >= info.load_numel_total:
                continue
            addresses = _addresses(info)
            if 0 not in addresses and complete.issuperset(
                addresses
            ):  # weights that were packed elsewhere have address 0
                tied.append(layers[name])
            else:
                missing.append(name)
        return missing, tied


def _addresses(info: Any) -> list[int]:
    """Return the addresses of the running parameters of a layer that is being reloaded."""
    return [parameter.data_ptr() for parameter in info.kernel_tensors[0].values()]


def _padded(layer: nn.Module, info: Any) -> bool:
    """Return whether a layer is an embedding with padded rows whose other rows were loaded."""
    rows = getattr(layer, "org_vocab_size", None)
    padded = getattr(layer, "num_embeddings_padded", None)
    return rows is not None and padded is not None and rows < padded and info.load_numel > 0
