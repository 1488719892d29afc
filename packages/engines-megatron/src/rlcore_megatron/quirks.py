"""Defects of megatron-core 0.16.1 that the engine works around in production."""

from __future__ import annotations

from typing import Any


def define_missing_gemm() -> None:
    """Let routers of mixtures of experts compute in fp32 without TransformerEngine; idempotent.

    The router's gating asks whether ``te_general_gemm`` is None, a name that ``moe_utils`` imports from
    TransformerEngine and does not define without it.
    """
    from megatron.core.transformer.moe import moe_utils

    utils: Any = moe_utils
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None
