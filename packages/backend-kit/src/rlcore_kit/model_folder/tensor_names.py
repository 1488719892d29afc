"""Convert between the parameters of a transformers module and the tensors in model files.

transformers (5 and later) fuses the experts of a layer into one parameter when it reads model files, which hold one
matrix for each expert. Rollout engines know the names in the files, so weights are transferred under these names.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)


def to_model_files(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of model files for the parameter ``name``: ``tensor`` under its name there, or its parts."""
    return revert_weight_conversion(model, {name: tensor})  # type: ignore[no-any-return]


class FromModelFiles:
    """Assembles the parameters of a model from tensors of model files, which come in any order.

    Only parts of incomplete parameters are kept in memory.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self._parts: dict[str, set[str]] = {}
        self._owner: dict[str, str] = {}
        for name, tensor in model.state_dict().items() if conversions else ():
            parts = to_model_files(model, name, tensor.to("meta"))
            if name not in parts:
                self._parts[name] = set(parts)
                self._owner |= dict.fromkeys(parts, name)
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Return name and value of the parameter that ``tensor`` is or completes; None if other parts are missing."""
        owner = self._owner.get(name)
        if owner is None:
            return name, tensor
        held = self._held.setdefault(owner, {})
        held[name] = tensor.clone()  # the sender may reuse its memory
        if len(held) < len(self._parts[owner]):
            return None
        return owner, self._fused(owner, self._held.pop(owner))

    def _fused(self, owner: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        renamed = {name: rename_source_key(name, self._renamings, self._converters) for name in parts}
        pattern = next(iter(renamed.values()))[1]
        if pattern is None:
            return next(iter(parts.values()))
        converter = deepcopy(next(one for one in self._converters if pattern in one.source_patterns))
        for name in sorted(parts, key=_by_number):  # parts are stacked in the order in which they are added
            converter.add_tensor(owner, name, renamed[name][1], parts[name])  # type: ignore[arg-type]
        fused: Any = converter.convert(owner, model=self._model, config=self._model.config)[owner]
        return fused[0] if isinstance(fused, list) else fused  # type: ignore[no-any-return]


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
