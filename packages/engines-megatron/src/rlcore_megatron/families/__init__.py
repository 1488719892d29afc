"""The supported model families: how each is configured in Megatron, and which parameter holds each of its tensors."""

from __future__ import annotations

from typing import Any

from rlcore.errors import EngineError
from rlcore_megatron.families.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from rlcore_megatron.families.family import Family
from rlcore_megatron.families.moe import MIXTRAL, QWEN3_MOE
from rlcore_megatron.families.weight import Weight

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE)}
"""Families by ``model_type`` of the Hugging Face configuration."""

__all__ = ["FAMILIES", "Family", "Weight", "family_of"]


def family_of(hf_config: Any) -> Family:
    """Return the family of a Hugging Face configuration.

    Raises:
        EngineError: the architecture is unknown, or has a feature that the engine does not compute.
    """
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise EngineError(
            f"the megatron engine does not support the architecture {hf_config.model_type!r}, only "
            f"{', '.join(sorted(FAMILIES))} (rlcore_megatron/families declares them); use engine=fsdp, which supports "
            "any causal language model of transformers"
        )
    family.check(hf_config)
    return family
