"""A weight transfer takes two buckets of memory at most, in each process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlcore.engines import WeightBucket
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.weight_transfer import Address, open_receiver, open_sender


class LiveBytes(TorchDispatchMode):
    """Measures the maximum number of bytes of the tensors made in this block."""

    def __init__(self, others: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._others:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


BUCKET_BYTES = 2 << 20
TENSOR_ELEMENTS = 1 << 17  # of bfloat16: eight tensors to a bucket


def masters(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {f"w{index}": torch.randn(TENSOR_ELEMENTS, generator=generator) for index in range(64)}
    for tensor in weights.values():
        tensor[:: 40 if version % 2 else 1] *= 1 + 0.01 * version
    return weights


def export(weights: dict[str, torch.Tensor]) -> Iterator[WeightBucket]:
    """Make buckets as a training engine does: the next tensor exists before a bucket is yielded."""
    held: list[tuple[str, torch.Tensor]] = []
    for name, tensor in weights.items():
        converted = tensor.bfloat16()
        if len(held) == 8:
            yield WeightBucket(tuple(held))
            held = []
        held.append((name, converted))
    yield WeightBucket(tuple(held))


def warm_up() -> None:
    """Use a dispatch mode once: the first use imports much of torch."""
    with LiveBytes():
        torch.empty(1)


def receive_and_measure(address: Address, count: int) -> tuple[int, list[int]]:
    mine = {name: torch.empty(TENSOR_ELEMENTS, dtype=torch.bfloat16) for name in masters(0)}
    receiver = open_receiver(address, int(os.environ["RANK"]))
    receiver.connect()
    peaks = []
    for version in range(1, count + 1):
        copies = [] if receiver._decoder is None else receiver._decoder._held.values()
        with LiveBytes((*mine.values(), *copies)) as live:
            for bucket in receiver.receive():  # holds the bucket before while the next one is made
                for name, tensor in bucket.tensors:
                    mine[name].copy_(tensor)
        made = 0 if version > 1 or receiver._decoder is None else 64 * 2 * TENSOR_ELEMENTS
        peaks.append(live.peak - made)
    wrong = sum(int((mine[name] != tensor.bfloat16()).sum()) for name, tensor in masters(count).items())
    return wrong, peaks


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    warm_up()
    pool.run(warm_up, timeout=300)
    yield pool
    pool.close()


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_memory_is_two_buckets_at_most(pool: RankPool, transport: Any, delta: bool) -> None:
    sender, address = open_sender(transport, receivers=2, timeout_s=200, bucket_bytes=BUCKET_BYTES, delta=delta)
    peaks = []
    with ThreadPoolExecutor(1) as executor:
        receiving = executor.submit(pool.run, receive_and_measure, address, 3, timeout=200)
        sender.connect()
        staging = sum(slot.nbytes for slot in sender._end._slots)  # there all the time
        for version in (1, 2, 3):
            weights = masters(version)
            copies = [] if sender._encoder is None else sender._encoder._held.values()
            with LiveBytes((*weights.values(), *copies, *sender._end._slots)) as live:
                stats = sender.send(export(weights), version)
            assert stats.delta == (delta and version > 1)
            # The first version of a delta makes the host copies, which stay.
            made = sum(tensor.nbytes for tensor in sender._encoder._held.values()) if delta and version == 1 else 0
            peaks.append(live.peak - made + staging)
        results = receiving.result(400)
    sender.close()
    assert min(peaks) > BUCKET_BYTES, "the exported bucket at least, else nothing was measured"
    assert max(peaks) <= 2 * BUCKET_BYTES
    for wrong, received in results:
        assert wrong == 0
        assert min(received) >= BUCKET_BYTES
        assert max(received) <= 2 * BUCKET_BYTES
