"""Bytes, seconds and memory of moving weights into other processes: full against delta, gloo against shared memory.

    uv run python benchmarks/weight_sync.py

What is measured: a decoder's tensors in bfloat16 (``--millions`` parameters) are sent by one process to one and to two
receivers, which copy them into separate weights. Version by version they are the bfloat16 copies of float32 master
weights that AdamW has stepped at ``--lr`` on random gradients. Contestants take turns within one run; each opens its
connection, sends one version whole, and is timed over the versions after it. Seconds run from the call of `send`, with
the copies that represent the trainer's export, to the last receiver's confirmation of a complete load: medians.

Memory is the most that a process's resident set (the kernel's VmHWM) grew over what it was before the connection was
opened. Shared memory counts in every process that touched it, and a delta's host copy of the weights counts too.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from rlcore.engines import WeightBucket
from rlcore_kit.weight_transfer import Address, TransferStats, open_receiver, open_sender

WEIGHTS = dict[str, torch.Tensor]


@dataclass
class Record:
    stats: list[TransferStats] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    sender_mib: list[float] = field(default_factory=list)
    receiver_mib: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=150)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--versions", type=int, default=3, help="timed versions in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = list(adamw_versions(arguments.millions * 1e6, arguments.lr, arguments.versions + 1))
    total = sum(tensor.nbytes for tensor in versions[0].values())
    print(
        f"{total / 2e6:.0f} M parameters in bfloat16, {total / 2**20:.0f} MiB, buckets of {arguments.bucket_mb} MiB, "
        f"{arguments.threads} thread(s) per process, lr {arguments.lr:g}"
    )
    contestants = [(receivers, transport, delta) for receivers in arguments.receivers
                   for transport in ("gloo", "shm") for delta in (False, True)]  # fmt: skip
    records = {contestant: Record() for contestant in contestants}
    with Receivers(max(arguments.receivers), versions[0], arguments.threads) as receivers:
        for _ in range(arguments.rounds):
            for contestant in contestants:
                run(records[contestant], *contestant, versions, arguments.bucket_mb << 20, receivers)
    report(records, total)


def run(
    record: Record,
    count: int,
    transport: Any,
    delta: bool,
    versions: list[WEIGHTS],
    bucket_bytes: int,
    receivers: Receivers,
) -> None:
    before = reset_peak_memory()
    sender, address = open_sender(transport, receivers=count, timeout_s=300, bucket_bytes=bucket_bytes, delta=delta)
    receivers.start(address, len(versions))
    stats = [sender.send(export(weights, bucket_bytes), version) for version, weights in enumerate(versions)]
    record.first.append(stats[0].seconds)
    record.stats += stats[1:]
    record.sender_mib.append((peak_memory() - before) / 2**20)
    record.receiver_mib += receivers.finish(count)
    sender.close()


def report(records: dict[tuple[int, str, bool], Record], total: int) -> None:
    columns = ["receivers", "transport", "mode", "changed", "MiB sent", "of full", "s", "GB/s of weights", "s, first"]
    print("", *columns, "MiB sender", "MiB receiver", "", sep=" | ")
    print("|---" * (len(columns) + 2) + "|")
    for (receivers, transport, delta), record in records.items():
        seconds = statistics.median(stats.seconds for stats in record.stats)
        sent = statistics.mean(stats.sent_bytes for stats in record.stats)
        changed = [stats.changed for stats in record.stats if stats.changed is not None]
        print(
            f"| {receivers} | {transport} | {'delta' if delta else 'full'} "
            f"| {f'{statistics.mean(changed):.2%}' if changed else ''} | {sent / 2**20:.1f} | {sent / total:.2%} "
            f"| {seconds:.3f} | {total / seconds / 1e9:.2f} | {statistics.median(record.first):.3f} "
            f"| {max(record.sender_mib):.0f} | {max(record.receiver_mib):.0f} |"
        )


def export(weights: WEIGHTS, bucket_bytes: int) -> Iterator[WeightBucket]:
    """Buckets of new tensors, as gathering shards makes them."""
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights.items():
        if held and size + tensor.nbytes > bucket_bytes:
            yield WeightBucket(tuple(held))
            held, size = [], 0
        held.append((name, tensor.clone()))
        size += tensor.nbytes
    yield WeightBucket(tuple(held))


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama-like decoder of about ``parameters``: an embedding, and layers of width 1024."""
    width, intermediate, vocabulary = 1024, 2816, 32_000
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (intermediate, width),
        "mlp.up_proj": (intermediate, width),
        "mlp.down_proj": (width, intermediate),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    size = sum(torch.Size(shape).numel() for shape in layer.values())
    for index in range(max(round((parameters - vocabulary * width) / size), 1)):
        named |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return named | {"model.norm.weight": (width,)}


def adamw_versions(parameters: float, lr: float, count: int) -> Iterator[WEIGHTS]:
    """bfloat16 copies after each step; ten steps come before, so that the moments are those of a run under way."""
    generator = torch.Generator().manual_seed(0)
    masters = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02)
        for name, shape in shapes(parameters).items()
    }
    optimizer = torch.optim.AdamW(masters.values(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
    for step in range(10 + count):
        for tensor in masters.values():
            tensor.grad = torch.randn(tensor.shape, generator=generator) * 1e-3
        optimizer.step()
        if step >= 10:
            yield {name: tensor.bfloat16() for name, tensor in masters.items()}


class Receivers:
    """Processes that load versions into separate weights."""

    def __init__(self, count: int, weights: WEIGHTS, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        shapes_of = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=receive, args=(theirs, rank, shapes_of, threads), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Receivers:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def start(self, address: Address, versions: int) -> None:
        for connection in self._connections[: address.receivers]:
            connection.send((address, versions))

    def finish(self, count: int) -> list[float]:
        """Memory in MiB of the first ``count`` receivers."""
        for connection in self._connections[:count]:
            assert connection.poll(300), "a receiver did not answer within 300 s"
        return [connection.recv() for connection in self._connections[:count]]


def receive(connection: Connection, rank: int, shapes_of: dict[str, tuple[int, ...]], threads: int) -> None:
    torch.set_num_threads(threads)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes_of.items()}
    for tensor in weights.values():
        tensor.fill_(1)  # its pages are there before memory is measured
    while True:
        address, versions = connection.recv()
        before = reset_peak_memory()
        receiver = open_receiver(address, rank)
        for _ in range(versions):
            for bucket in receiver.receive():
                for name, tensor in bucket.tensors:
                    weights[name].copy_(tensor)
        receiver.close()
        connection.send((peak_memory() - before) / 2**20)
        del receiver, bucket, tensor


def reset_peak_memory() -> int:
    """Forget the peak; the resident set now, in bytes, without what malloc keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_memory() -> int:
    return status("VmHWM")


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    main()
