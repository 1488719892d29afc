"""What stands in the KV cache before anything was written."""

import torch

from rlcore_fsdp.inline.kv_cache import KVCache, LayerShape


def test_unwritten_positions_are_finite() -> None:
    # freed memory full of NaN is what the allocator hands out next
    for dtype in (torch.float32, torch.bfloat16):
        garbage = [torch.full((64 * 4 * 8,), torch.nan, dtype=dtype) for _ in range(64)]
        del garbage
        cache = KVCache([LayerShape(heads=4, key_dim=8, value_dim=8, dtype=dtype)] * 4, 64, torch.device("cpu"))
        for layer in range(4):
            for grid in cache.view(layer, rows=1, span=64):
                assert bool((grid == 0).all())
