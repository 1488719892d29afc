"""The router of experts in megatron-core 0.16.1 where TransformerEngine is not installed."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Let the router compute in fp32 without TransformerEngine; idempotent.

    Its gating asks whether ``te_general_gemm`` is None, a name that ``moe_utils`` imports from TransformerEngine and
    forgets to define without it.
    """
    from megatron.core.transformer.moe import moe_utils

    module: Any = moe_utils
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None
