"""Rotary position embeddings: Megatron's arguments for the frequencies that transformers computes."""

from __future__ import annotations

from typing import Any

from rlcore.errors import EngineError

# Megatron-core 0.16 has the other numbers of Llama 3 as constants (`RotaryEmbedding._apply_scaling`).
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def rope_arguments(hf_config: Any) -> dict[str, Any]:
    """Return the arguments of ``GPTModel`` for rotary embeddings.

    Raises:
        EngineError: the frequencies are scaled in a way that Megatron does not compute.
    """
    rope = hf_config.rope_parameters
    kind = rope.get("rope_type", "default")
    arguments: dict[str, Any] = {"rotary_base": rope["rope_theta"], "rotary_percent": 1.0}
    problem = None
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problem = f"partial_rotary_factor {rope['partial_rotary_factor']}"
    elif kind == "llama3":
        arguments |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
        other = {name: rope[name] for name, value in _LLAMA3.items() if rope[name] != value}
        if other:
            problem = f"rope_type llama3 with {other} (megatron-core only has {_LLAMA3})"
    elif kind != "default":
        problem = f"rope_type {kind!r}"
    if problem:
        raise EngineError(
            f"the megatron engine does not support rotary embeddings with {problem}, only rope_type default and "
            "llama3; use engine=fsdp"
        )
    return arguments
