"""The KV cache of the inline rollout: what is written stays where it belongs."""

import torch

from rlcore_inline.kv_cache import KVCache, LayerShape, whole_blocks

SHAPES = [LayerShape(2, 3, 5, torch.float32), LayerShape(1, 4, 4, torch.float32)]
CPU = torch.device("cpu")


def contents(cache: KVCache, rows: int, length: int) -> list[torch.Tensor]:
    return [grid.clone() for layer in range(len(SHAPES)) for grid in cache.view(layer, rows, length)]


def filled(rows: int, length: int, width: int) -> KVCache:
    cache = KVCache(SHAPES, 1024, CPU)
    cache.resize(width, 0, 0)
    for layer, shape in enumerate(SHAPES):
        keys = torch.randn(rows, shape.heads, length, shape.key_dim)
        cache.write_prompts(layer, torch.arange(rows), keys, torch.randn(rows, shape.heads, length, shape.value_dim))
    return cache


def test_whole_blocks() -> None:
    assert [whole_blocks(n) for n in (1, 64, 65, 4096)] == [64, 64, 128, 4096]


def test_widths_change_in_place() -> None:
    cache = filled(rows=5, length=50, width=64)
    before = contents(cache, 5, 50)
    for width in (192, 128, 64):
        cache.resize(width, 5, 50)
        assert cache.rows == 1024 // width
        for old, new in zip(before, contents(cache, 5, 50), strict=True):
            assert torch.equal(old, new)


def test_rows_are_copied() -> None:
    cache = filled(rows=4, length=30, width=64)
    before = contents(cache, 4, 30)
    cache.copy_rows(torch.tensor([3, 1]), torch.tensor([0, 2]), 30)
    for old, new in zip(before, contents(cache, 4, 30), strict=True):
        assert torch.equal(new, old[[3, 1, 1, 3]])


def test_one_position_per_row_is_written_through_flat_indices() -> None:
    cache = filled(rows=3, length=20, width=128)
    positions = torch.tensor([5, 19, 0])
    for layer, shape in enumerate(SHAPES):
        expected = cache.view(layer, 3, 20)[0].clone()
        new = torch.randn(3, shape.heads, shape.key_dim)
        for row in range(3):
            expected[row, :, positions[row]] = new[row]
        index = cache.flat_index(positions, shape.heads)
        cache.flat(layer)[0].index_copy_(0, index, new.view(-1, shape.key_dim))
        assert torch.equal(cache.view(layer, 3, 20)[0], expected)


def test_unwritten_positions_are_finite() -> None:
    # freed memory full of NaN is what the allocator hands out next
    for dtype in (torch.float32, torch.bfloat16):
        garbage = [torch.full((64 * 4 * 8,), torch.nan, dtype=dtype) for _ in range(64)]
        del garbage
        cache = KVCache([LayerShape(heads=4, key_dim=8, value_dim=8, dtype=dtype)] * 4, 64, CPU)
        for layer in range(4):
            for grid in cache.view(layer, rows=1, span=64):
                assert bool((grid == 0).all())
