"""Deltas give back every bit, whatever changed, and say so when they cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rlcore.engines import WeightBucket
from rlcore_kit.weight_transfer import delta
from rlcore_kit.weight_transfer.delta import DeltaDecoder, DeltaEncoder, decode_block, encode_block
from rlcore_kit.weight_transfer.flat import Payload, PieceReader, as_bytes

UNSIGNED = [np.uint8, np.uint16, np.uint32, np.uint64]


def slow_decode(old: list[int], block: delta.Block, data: bytes, width: int) -> list[int]:
    """Decode the format one element at a time, with Python's integers."""
    where, how, _, place_bytes, _ = block
    new = list(old)
    place, values = data[:place_bytes], data[place_bytes:]
    number = lambda raw: int.from_bytes(raw, "little")  # noqa: E731
    if where == "none":
        return new
    if how == "full":
        return [number(data[i * width : (i + 1) * width]) for i in range(len(old))]
    if where == "all":
        positions = list(range(len(old)))
    elif where == "bits":
        positions = [i for i in range(len(old)) if place[i // 8] >> (7 - i % 8) & 1]
    else:
        size = {"gap1": 1, "gap2": 2}[where]
        positions, at, most = [], -1, 256**size - 1
        for i in range(0, len(place), size):
            code = number(place[i : i + size])
            at += code
            if code != most:
                at += 1
                positions.append(at)
    if how == "raw":
        for i, position in enumerate(positions):
            new[position] = number(values[i * width : (i + 1) * width])
        assert len(values) == len(positions) * width
        return new
    behind = len(positions)
    for i, position in enumerate(positions):
        step = int.from_bytes(values[i : i + 1], "little", signed=True)
        if step == -128:
            new[position] = number(values[behind : behind + width])
            behind += width
        else:
            new[position] = (old[position] + step) % 256**width
    assert behind == len(values)
    return new


@st.composite
def two_versions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Bits before and after, with anything from no change to all changed, near or far."""
    dtype = draw(st.sampled_from(UNSIGNED))
    n = draw(st.integers(1, 700))
    old = draw(arrays.arrays(dtype, n, elements=st.integers(0, int(np.iinfo(dtype).max)), fill=st.just(0x7F)))
    share = draw(st.sampled_from([0.0, 0.002, 0.02, 0.3, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    changed = random.random(n) < share
    near = draw(st.sampled_from([0.0, 0.9, 1.0]))
    step = np.where(random.random(n) < near, random.integers(-3, 4, n), random.integers(0, 2**63, n))
    return old, np.where(changed, (old.astype(np.uint64) + step.astype(np.uint64)).astype(dtype), old)


@given(two_versions())
@settings(max_examples=400)
def test_blocks_give_back_every_bit_and_are_never_larger_than_the_full_block(
    versions: tuple[np.ndarray, np.ndarray],
) -> None:
    old, new = versions
    block, parts = encode_block(old, new)
    data = new.tobytes() if block[1] == "full" else b"".join(part.tobytes() for part in parts)
    assert block[2] == int((old != new).sum())
    assert len(data) <= new.nbytes
    if block[1] != "full":
        assert block[3] + block[4] == len(data)
    assert slow_decode(old.tolist(), block, data, new.itemsize) == new.tolist()
    bits = old.copy()
    decode_block(bits, block, np.frombuffer(data, np.uint8))
    assert np.array_equal(bits, new)


@pytest.mark.parametrize(
    ("every", "step", "where", "how"),
    [
        (50, 1, "gap1", "step"),
        (50, 1 << 14, "gap1", "raw"),
        (3000, 1, "gap2", "step"),
        (70_000, 1, "gap2", "step"),
        (3, 1, "bits", "step"),
        (1, 1, "all", "step"),
        (1, 1 << 14, "all", "full"),
    ],
)
def test_the_smallest_encoding_is_taken(every: int, step: int, where: str, how: str) -> None:
    old = np.arange(300_000).astype(np.uint16)
    new = old.copy()
    new[::every] += np.uint16(step)
    block, parts = encode_block(old, new)
    assert block[:2] == (where, how)
    bits = old.copy()
    data = new.view(np.uint8) if how == "full" else np.concatenate([part.view(np.uint8) for part in parts])
    decode_block(bits, block, data)
    assert np.array_equal(bits, new)


@pytest.mark.parametrize("where", ["gap1", "gap2"])
@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 65_534, 65_535, 65_536, 131_070, 131_071])
def test_gaps_of_every_length(where: str, gap: int) -> None:
    gaps = np.array([gap, 0, gap], dtype=np.int64)
    codes = delta._encode_gaps(gaps, delta._GAPS[where])
    assert delta._decode_gaps(codes).tolist() == [gap, gap + 1, 2 * gap + 2]


def received(payload: Payload) -> torch.Tensor:
    flat = torch.zeros(payload.nbytes, dtype=torch.uint8)
    PieceReader(payload).read_into(flat)
    return flat


def exchange(encoder: DeltaEncoder, decoder: DeltaDecoder, weights: dict[str, torch.Tensor], version: int) -> Payload:
    """Transfer one version, in full unless both sides hold the same base; compare the result bit by bit."""
    full = encoder.base is None or encoder.base != decoder.base
    encoder.begin()
    decoder.begin()
    bucket = WeightBucket(tuple(weights.items()))
    payload = encoder.encode(bucket, full)
    assert decoder.apply(payload.entries, received(payload), payload.checksum)
    decoder.finish(encoder.finish(version))
    got = dict(decoder.bucket(payload.entries, torch.device("cpu")).tensors)
    assert list(got) == list(weights)
    for name, tensor in weights.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(as_bytes(got[name]), as_bytes(tensor)), name
    return payload


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]
)
def test_versions_of_every_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "_BLOCK_ELEMENTS", 1000)  # several blocks, the last one short
    generator = torch.Generator().manual_seed(0)
    weights = {
        "matrix": torch.randint(0, 2, (70, 61), generator=generator).to(dtype),
        "transposed": torch.randint(0, 2, (9, 30), generator=generator).to(dtype).T,
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty((0, 3), dtype=dtype),
    }
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    first = exchange(encoder, decoder, weights, 1)
    assert first.nbytes >= sum(tensor.nbytes for tensor in weights.values())
    same = exchange(encoder, decoder, weights, 2)
    assert same.nbytes == 0
    assert encoder.changed == 0
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed["matrix"][3, 5] = 1 - int(weights["matrix"][3, 5].real)
    changed["scalar"].zero_()
    third = exchange(encoder, decoder, changed, 3)
    assert encoder.changed == 2
    assert third.nbytes < 100


def test_signed_zeros_and_not_a_numbers_are_bits() -> None:
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)  # every bfloat16 there is
    exchange(encoder, decoder, {"w": patterns.view(torch.bfloat16)}, 1)
    exchange(encoder, decoder, {"w": patterns.flip(0).view(torch.bfloat16)}, 2)
    exchange(encoder, decoder, {"w": torch.full((1 << 16,), -0.0, dtype=torch.bfloat16)}, 3)
    exchange(encoder, decoder, {"w": torch.zeros(1 << 16, dtype=torch.bfloat16)}, 4)
    assert encoder.changed == 1 << 16
    exchange(encoder, decoder, {"w": torch.full((1 << 16,), float("nan"), dtype=torch.bfloat16)}, 5)
    assert exchange(encoder, decoder, {"w": torch.full((1 << 16,), float("nan"), dtype=torch.bfloat16)}, 6).nbytes == 0


def test_tensors_may_appear_disappear_and_change_shape() -> None:
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    exchange(encoder, decoder, {"a": torch.ones(5), "b": torch.ones(6)}, 1)
    exchange(encoder, decoder, {"a": torch.ones(5), "c": torch.ones(2, 3)}, 2)
    exchange(encoder, decoder, {"a": torch.ones(7), "b": torch.zeros(6), "c": torch.ones(2, 3, dtype=torch.int32)}, 3)


def test_encoded_blocks_keep_to_their_memory() -> None:
    weights = {"w": torch.zeros(100_000, dtype=torch.float32)}
    encoder, decoder = DeltaEncoder(max_new_bytes=1000), DeltaDecoder()
    exchange(encoder, decoder, weights, 1)
    changed = {"w": weights["w"].clone()}
    changed["w"][::5] = 0.1
    payload = exchange(encoder, decoder, changed, 2)
    assert payload.nbytes == 400_000, "sent in full, from the copy"
    assert payload.parts[0][0].data_ptr() == encoder._held["w"].data_ptr()


def test_a_receiver_that_missed_a_version_gets_full_tensors() -> None:
    encoder, decoder, other = DeltaEncoder(), DeltaDecoder(), DeltaDecoder()
    exchange(encoder, decoder, {"w": torch.zeros(1000)}, 1)
    exchange(encoder, decoder, {"w": torch.ones(1000)}, 2)
    assert other.base != encoder.base
    restarted = DeltaEncoder()
    exchange(restarted, other, {"w": torch.zeros(1000)}, 2)
    assert other.base != encoder.base, "the same version number of another sender"
    encoder.begin()
    assert encoder.base is None, "a version under way is no base"


@given(st.integers(0, 2**32), st.integers(0, 10_000))
@settings(max_examples=200)
def test_damage_is_detected(seed: int, where: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(3000, generator=generator).bfloat16()
    new = torch.where(torch.rand(3000, generator=generator) < 0.05, old * 1.01, old)
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    exchange(encoder, decoder, {"w": old}, 1)
    encoder.begin()
    decoder.begin()
    bucket = WeightBucket((("w", new),))
    payload = encoder.encode(bucket, full=False)
    flat = received(payload)[: payload.entries[0].nbytes].clone()
    flat[where % len(flat)] ^= 1 << where % 8
    assert not decoder.apply(payload.entries, flat, payload.checksum)
    again = encoder.encode_full(["w"])
    assert decoder.apply(again.entries, received(again), again.checksum), "the full bucket repairs it"
    assert torch.equal(as_bytes(dict(decoder.bucket(again.entries, torch.device("cpu")).tensors)["w"]), as_bytes(new))


def test_a_copy_is_not_the_decoders_own() -> None:
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    payload = exchange(encoder, decoder, {"w": torch.zeros(10)}, 1)
    dict(decoder.bucket(payload.entries, torch.device("cpu")).tensors)["w"].fill_(7)
    exchange(encoder, decoder, {"w": torch.zeros(10)}, 2)
