"""Weights arrive bit by bit in other processes, within two buckets of memory; the process that fails is named."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.engines import WeightBucket
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.weight_transfer import Address, TransferError, open_receiver, open_sender
from rlcore_kit.weight_transfer.flat import as_bytes
from rlcore_kit.weight_transfer.transport_choice import WeightLocation, choose

BUCKET_BYTES = 1 << 20
TRANSPORTS = ["gloo", "shm"]
# Nothing waits as long: a busy machine may be slow.
TIMEOUT_S = 200


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two processes, for receivers."""
    pool = RankPool(2)
    pool.run(pids)  # started before anything waits for it
    yield pool
    pool.close()


class Running:
    """A call that runs in all processes of a pool at the same time as this process."""

    def __init__(self, pool: RankPool, function: Any, *args: Any, timeout: float = TIMEOUT_S) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._future: Future[list[Any]] = self._executor.submit(pool.run, function, *args, timeout=timeout)

    def results(self) -> list[Any]:
        try:
            return self._future.result(2 * TIMEOUT_S)
        finally:
            self._executor.shutdown(wait=False)


def weights_of(version: int) -> dict[str, torch.Tensor]:
    """Make tensors of every kind; a few elements differ from version to version."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "bf16": torch.randn(513, 211, generator=generator).bfloat16(),
        "fp16": torch.randn(100, generator=generator).half(),
        "fp32": torch.randn(7, 3, 5, generator=generator),
        "int64": torch.randint(-(2**62), 2**62, (33,), generator=generator),
        "bool": torch.rand(17, generator=generator) > 0.5,
        "odd bytes": torch.randint(0, 255, (3,), generator=generator, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "not contiguous": torch.randn(300, 200, generator=generator).T,
        "strided": torch.randn(100, generator=generator)[::3],
        "larger than a bucket": torch.randn(2 * BUCKET_BYTES // 4 + 11, generator=generator),
        "special": torch.tensor([float("nan"), -0.0, 0.0, float("inf")], dtype=torch.bfloat16),
    }
    for step in range(version):
        weights["bf16"][step::50] *= 1.01
        weights["larger than a bucket"][step::1000] += 1
        weights["scalar"].add_(1)
    return weights


def buckets_of(weights: dict[str, torch.Tensor], count: int = 3) -> Iterator[WeightBucket]:
    items = list(weights.items())
    for start in range(0, len(items), count):
        yield WeightBucket(tuple(items[start : start + count]))


def differences(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that differ in any bit or are out of order."""
    if list(got) != list(expected):
        return [f"names {list(got)}"]
    return [
        name
        for name, tensor in expected.items()
        if got[name].dtype != tensor.dtype
        or got[name].shape != tensor.shape
        or not torch.equal(as_bytes(got[name]), as_bytes(tensor))
    ]


def rank() -> int:
    return int(os.environ["RANK"])


def receive_and_compare(address: Address, versions: list[int]) -> list[tuple[int, list[str]]]:
    """Keep every tensor to the end and compare only then."""
    receiver = open_receiver(address, rank())
    got = []
    for _ in versions:
        buckets = receiver.receive()
        got.append((receiver.version, dict(pair for bucket in buckets for pair in bucket.tensors)))
    receiver.close()
    return [(version, differences(weights, weights_of(version))) for version, weights in got]


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("transport", [*TRANSPORTS, "auto"])
def test_every_bit_arrives_in_all_receivers(pool: RankPool, transport: Any, delta: bool) -> None:
    versions = [1, 2, 2, 5]
    sender, address = open_sender(transport, receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES, delta=delta)
    running = Running(pool, receive_and_compare, address, versions)
    stats = [sender.send(buckets_of(weights_of(version)), version) for version in versions]
    sender.close()
    assert running.results() == [[(version, []) for version in versions]] * 2
    assert {one.transport for one in stats} == {"shm" if transport == "auto" else transport}
    full = sum(tensor.nbytes for tensor in weights_of(1).values())
    assert [one.full_bytes for one in stats] == [full] * 4
    assert [one.buckets for one in stats] == [4] * 4
    assert [one.delta for one in stats] == ([False, True, True, True] if delta else [False] * 4)
    if delta:
        assert stats[2].sent_bytes == 0, "the same version again"
        assert stats[1].sent_bytes < full / 20
        changed = sum(int((weights_of(1)[name] != weights_of(2)[name]).sum()) for name in weights_of(1))
        nans = 1  # differs from itself
        assert stats[1].changed == (changed - nans) / sum(tensor.numel() for tensor in weights_of(1).values())
    else:
        assert all(full <= one.sent_bytes < full + 16 * len(weights_of(1)) for one in stats)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_receiver_and_no_buckets(pool: RankPool, transport: Any) -> None:
    sender, address = open_sender(transport, receivers=1, timeout_s=TIMEOUT_S)
    running = Running(pool, take_all_on_rank_zero, address, 2)
    assert sender.send([], 1).buckets == 0
    assert sender.send([WeightBucket(())], 2).sent_bytes == 0
    sender.close()
    assert running.results() == [[(1, 0), (2, 0)], None]


def take_all_on_rank_zero(address: Address, count: int) -> list[tuple[int, int]] | None:
    if rank() != 0:
        return None
    receiver = open_receiver(address, 0)
    taken = []
    for _ in range(count):
        buckets = receiver.receive()
        taken.append((receiver.version, sum(bucket.nbytes for bucket in buckets)))
    return taken


def test_the_fastest_transport_that_works_is_chosen() -> None:
    cpu, other = WeightLocation("h", None), WeightLocation("elsewhere", None)
    a, b, c, far = (
        WeightLocation("h", "a"),
        WeightLocation("h", "b"),
        WeightLocation("h", "c"),
        WeightLocation("elsewhere", "d"),
    )
    assert choose(cpu, [cpu, cpu], delta=False) == "shm"
    assert choose(cpu, [cpu, other], delta=False) == "gloo"
    assert choose(a, [a, a], delta=False) == "ipc"
    assert choose(a, [b, c], delta=False) == "nccl"
    assert choose(a, [b, far], delta=False) == "nccl"
    assert choose(a, [b, b], delta=False) == "shm", "two NCCL ranks cannot share a GPU"
    assert choose(a, [a, far], delta=False) == "gloo"
    assert choose(a, [cpu], delta=False) == "shm"
    assert choose(a, [b, c], delta=True) == "shm"
    assert choose(a, [b, far], delta=True) == "gloo"


# Deltas: receivers that lack the base, damaged bytes.


def receive_with(address: Address, versions: list[int], forget: tuple[int, int], damage: tuple[int, int]) -> Any:
    """Receiver 1 forgets its version before one transfer, or finds bytes flipped in some deliveries."""
    receiver = open_receiver(address, rank())
    receiver.connect()
    first_damaged, damaged_count = damage
    delivered = 0
    original = receiver._end.receive_into

    def receive_into(flat: torch.Tensor, bucket: str) -> None:
        nonlocal delivered
        original(flat, bucket)
        if rank() == 1 and flat.numel() > 10_000:
            if first_damaged <= delivered < first_damaged + damaged_count:
                flat[5000] ^= 4
            delivered += 1

    receiver._end.receive_into = receive_into
    wrong = []
    for index, version in enumerate(versions):
        if rank() == 1 and index == forget[0]:
            receiver._decoder.base = ("another", forget[1])
        got = dict(pair for bucket in receiver.receive() for pair in bucket.tensors)
        wrong += differences(got, weights_of(version))
    return wrong


NEVER = (-1, 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receiver_without_the_base_makes_it_a_full_transfer(pool: RankPool, transport: Any) -> None:
    sender, address = open_sender(transport, receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES, delta=True)
    running = Running(pool, receive_with, address, [1, 2, 3, 4], (2, 2), NEVER)
    stats = [sender.send(buckets_of(weights_of(version)), version) for version in [1, 2, 3, 4]]
    sender.close()
    assert running.results() == [[], []]
    assert [one.delta for one in stats] == [False, True, False, True]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_damaged_bucket_is_sent_again(pool: RankPool, transport: Any) -> None:
    sender, address = open_sender(transport, receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES, delta=True)
    running = Running(pool, receive_with, address, [1, 2], NEVER, (1, 1))
    stats = [sender.send(buckets_of(weights_of(version)), version) for version in [1, 2]]
    sender.close()
    assert running.results() == [[], []]
    assert [one.resent_buckets for one in stats] == [1, 0]


def test_damage_twice_in_a_row_is_an_error(pool: RankPool) -> None:
    sender, address = open_sender("shm", receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES, delta=True)
    running = Running(pool, error_of, receive_with.__name__, (address, [1], NEVER, (1, 2)))
    with pytest.raises(
        TransferError, match=r"receiver 1 of 2 failed: .*bucket \d of version 1 was damaged in transfer twice"
    ):
        sender.send(buckets_of(weights_of(1)), 1)
    assert [text is not None and "damaged in transfer twice" in text for text in running.results()] == [True, True]


# Failures. Each test then moves weights over a new connection.


def error_of(function: str, args: tuple[Any, ...]) -> str | None:
    try:
        globals()[function](*args)
    except TransferError as error:
        return str(error)
    return None


def check_a_new_connection(pool: RankPool, transport: Any) -> None:
    sender, address = open_sender(transport, receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)
    running = Running(pool, receive_and_compare, address, [7])
    sender.send(buckets_of(weights_of(7)), 7)
    sender.close()
    assert running.results() == [[(7, [])]] * 2


class Export:
    """An export that records whether it was consumed to the end, and may kill or stop a process meanwhile."""

    def __init__(self, signals: Iterable[tuple[int, int, int]] = (), fail_at: int = -1) -> None:
        self.finished = False
        self._signals = {bucket: (pid, number) for bucket, pid, number in signals}
        self._fail_at = fail_at

    def __iter__(self) -> Iterator[WeightBucket]:
        for index, bucket in enumerate(buckets_of(weights_of(1))):
            if index in self._signals:
                os.kill(*self._signals[index])
            if index == self._fail_at:
                raise RuntimeError("the export failed")
            yield bucket
        self.finished = True


def take_twice(address: Address) -> None:
    receiver = open_receiver(address, rank())
    for _ in range(2):
        for _ in receiver.receive():
            pass


def pids() -> int:
    return os.getpid()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("bucket", [0, 2])
def test_a_killed_receiver_is_named_immediately(transport: Any, bucket: int) -> None:
    pool = RankPool(2)
    try:
        victim = pool.run(pids)[1]
        sender, address = open_sender(transport, receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)
        running = Running(pool, error_of, "take_twice", (address,))
        sender.send(Export(), 1)
        export = Export([(bucket, victim, signal.SIGKILL)])
        with pytest.raises(TransferError, match="receiver 1 of 2 closed the connection") as caught:
            sender.send(export, 2)
        assert caught.value.receivers == (1,)
        assert export.finished, "the trainer's other ranks would wait for ever"
        with pytest.raises(TransferError, match="closed"):
            sender.send(Export(), 3)
        with pytest.raises(AssertionError, match="the process died"):
            running.results()
        check_a_new_connection(pool, transport)
    finally:
        pool.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receiver_that_hangs_is_named_to_all(pool: RankPool, transport: Any) -> None:
    sluggard = pool.run(pids)[0]
    sender, address = open_sender(transport, receivers=2, timeout_s=8, bucket_bytes=BUCKET_BYTES)
    running = Running(pool, error_of, "take_twice", (address,))
    sender.send(Export(), 1)
    export = Export([(2, sluggard, signal.SIGSTOP)])
    try:
        with pytest.raises(
            TransferError, match=r"^receiver 0 of 2 did not take bucket \d of version 2 within 8 s"
        ) as caught:
            sender.send(export, 2)
    finally:
        os.kill(sluggard, signal.SIGCONT)
    assert caught.value.receivers == (0,)
    assert export.finished
    assert all(text is not None for text in running.results())
    check_a_new_connection(pool, transport)


def test_a_receiver_that_never_comes_is_named(pool: RankPool) -> None:
    sender, address = open_sender("gloo", receivers=2, timeout_s=8)
    running = Running(pool, take_all_on_rank_zero_or_error, address)
    with pytest.raises(TransferError, match=r"receiver 1 of 2 did not connect within 8 s") as caught:
        sender.send(Export(), 1)
    assert caught.value.receivers == (1,)
    assert "weight sender" in running.results()[0]


def take_all_on_rank_zero_or_error(address: Address) -> str | None:
    return error_of("take_all_on_rank_zero", (address, 1))


def test_an_export_that_fails_reaches_all_receivers(pool: RankPool) -> None:
    sender, address = open_sender("shm", receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)
    running = Running(pool, error_of, "take_twice", (address,))
    with pytest.raises(RuntimeError, match="the export failed"):
        sender.send(Export(fail_at=2), 1)
    assert running.results() == ["the weight sender failed: RuntimeError: the export failed"] * 2


class FailingEngine:
    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        for index, _ in enumerate(buckets):
            if index == 1 and rank() == 1:
                raise ValueError("no room for bucket 2")


class LazyEngine:
    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        next(iter(buckets))


def load(address: Address, engine: str) -> str | None:
    try:
        open_receiver(address, rank()).load_into(globals()[engine]())
    except (ValueError, TransferError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("FailingEngine", "receiver 1 of 2 failed: ValueError: no room for bucket 2"),
        ("LazyEngine", r"receiver \d of 2 failed: .*LazyEngine.update_weights did not take all buckets"),
    ],
)
def test_an_engine_that_fails_ends_the_transfer_for_all(pool: RankPool, engine: str, reason: str) -> None:
    sender, address = open_sender("shm", receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)
    running = Running(pool, load, address, engine)
    with pytest.raises(TransferError, match=reason):
        sender.send(Export(), 1)
    texts = running.results()
    assert all(texts)
    if engine == "FailingEngine":
        assert texts[1] == "no room for bucket 2", "the engine's own error in its own process"


def open_and_send(path: str, transport: Any) -> None:
    if rank() == 1:
        return
    sender, address = open_sender(transport, receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)
    temporary = Path(path).with_suffix(".partial")
    temporary.write_bytes(pickle.dumps(address))
    temporary.rename(path)
    sender.send(Export([(2, os.getpid(), signal.SIGKILL)]), 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_receivers_notice_that_the_sender_was_killed(pool: RankPool, transport: Any, tmp_path: Path) -> None:
    trainers = RankPool(2)
    try:
        path = tmp_path / "address"
        sending = Running(trainers, open_and_send, str(path), transport)
        deadline = time.monotonic() + TIMEOUT_S
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        address = pickle.loads(path.read_bytes())
        for text in Running(pool, error_of, "take_twice", (address,)).results():
            assert text is not None
            assert "the weight sender closed the connection" in text
        with pytest.raises(AssertionError, match="the process died"):
            sending.results()
    finally:
        trainers.close()


# What can be reached from outside.


def test_foreign_connections_are_refused(pool: RankPool) -> None:
    sender, address = open_sender("shm", receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)
    assert address.token not in repr(address)
    garbage = socket.create_connection((address.host, address.port))
    garbage.sendall(b"\xff\xff\xff\xff" + b"x" * 100)
    guess = open_receiver(Address(address.host, address.port, 2, TIMEOUT_S, "wrong token"), 0)
    running = Running(pool, receive_and_compare, address, [1])
    sender.send(buckets_of(weights_of(1)), 1)
    assert running.results() == [[(1, [])]] * 2
    with pytest.raises(TransferError, match="closed the connection"):
        guess.receive()
    garbage.close()
    sender.close()


def listeners() -> set[str]:
    """Return the addresses and ports, as in /proc/net/tcp, at which this process listens for TCP."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except FileNotFoundError:  # the one by which the folder was read
            continue
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        if Path(table).exists():
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    found.add(fields[1])
    return found


def receive_and_list_listeners(address: Address) -> tuple[set[str], set[str]]:
    before = listeners()
    receiver = open_receiver(address, rank())
    for _ in receiver.receive():
        pass
    meanwhile = listeners() - before
    receiver.close()
    return meanwhile, listeners() - before


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_only_the_address_listens_and_only_until_the_end(pool: RankPool, transport: Any) -> None:
    before = listeners()
    sender, address = open_sender(transport, receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)
    waiting = listeners() - before
    running = Running(pool, receive_and_list_listeners, address)
    sender.send(buckets_of(weights_of(1)), 1)
    ours = listeners() - before
    theirs = running.results()
    sender.close()
    assert len(waiting) == 1
    assert bool(ours) == (transport == "gloo")
    for found in (waiting, ours, *(meanwhile for meanwhile, _ in theirs)):
        assert all(listener.startswith("0100007F:") for listener in found), "127.0.0.1 in the kernel's order"
    assert [afterwards for _, afterwards in theirs] == [set(), set()]
    assert listeners() == before


def shared_memory() -> list[str]:
    """Return the mappings and open files of this process that are shared memory."""
    mapped = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    return [name for name in (*mapped, *opened) if "rlcore-weights" in name or "/dev/shm" in name]


def receive_and_list_shared_memory(address: Address) -> tuple[list[str], list[str]]:
    gc.collect()  # what earlier tests broke off may still be held by their tracebacks
    before = Counter(shared_memory())
    receiver = open_receiver(address, rank())
    for _ in receiver.receive():
        pass
    meanwhile = Counter(shared_memory()) - before
    receiver.close()
    return list(meanwhile), list(Counter(shared_memory()) - before)


def test_shared_memory_has_no_name_and_goes_with_the_connection(pool: RankPool) -> None:
    gc.collect()  # what earlier tests broke off may still be held by their tracebacks
    before = shared_memory()
    sender, address = open_sender("shm", receivers=2, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)
    running = Running(pool, receive_and_list_shared_memory, address)
    sender.send(buckets_of(weights_of(1)), 1)
    ours = list((Counter(shared_memory()) - Counter(before)).elements())
    theirs = running.results()
    sender.close()
    for meanwhile in (ours, *(meanwhile for meanwhile, _ in theirs)):
        assert set(meanwhile) == {"/memfd:rlcore-weights (deleted)"}  # the mapping, and the descriptor that mmap keeps
    assert [afterwards for _, afterwards in theirs] == [[], []]
    assert shared_memory() == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"receivers": 0}, "receivers must be at least 1"),
        ({"receivers": 1, "transport": "mpi"}, "transport must be auto, gloo"),
        ({"receivers": 1, "host": "0.0.0.0"}, "host must be one address"),
        ({"receivers": 1, "transport": "nccl"}, "CUDA"),
        ({"receivers": 1, "bucket_bytes": 0}, "bucket_bytes must be"),
        ({"receivers": 1, "timeout_s": 0}, "timeout_s must be"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_sender(**arguments)


def test_a_closed_sender_cannot_be_reached() -> None:
    sender, address = open_sender("shm", receivers=1)
    sender.close()
    with pytest.raises(TransferError, match=r"receiver 0 cannot reach the weight sender at 127\.0\.0\.1"):
        open_receiver(address, 0)
