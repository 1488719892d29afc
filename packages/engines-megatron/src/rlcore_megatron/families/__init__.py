"""The model families that the engine knows: how each is configured in Megatron, and where each of its tensors goes."""

from __future__ import annotations

from typing import Any

from rlcore.errors import EngineError
from rlcore_megatron.families.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from rlcore_megatron.families.family import Family
from rlcore_megatron.families.moe import MIXTRAL, QWEN3_MOE
from rlcore_megatron.families.weight import Weight

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE)}
"""By ``model_type`` of the Hugging Face configuration."""

__all__ = ["FAMILIES", "Family", "Weight", "family_of"]


def family_of(hf_config: Any) -> Family:
    """The family of a Hugging Face configuration.

    Raises:
        EngineError: the architecture is unknown, or has something that the engine does not compute.
    """
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise EngineError(
            f"the megatron engine does not know the architecture {hf_config.model_type!r}; it knows "
            f"{', '.join(sorted(FAMILIES))} (another one is a declaration in rlcore_megatron/families); engine=fsdp "
            "takes any causal language model of transformers"
        )
    family.check(hf_config)
    return family
