"""What a driver process pays per step when tokens per step grow: batches by reference against batches by value.

    OMP_NUM_THREADS=1 uv run python benchmarks/by_reference.py

A toy step over Ray: a rollout process makes the trajectories of every prompt, a reward process scores them, a policy
of two ranks makes two columns of log-probs, a compute process makes advantages out of all of that, and the policy
trains on two mini-batches. Engines only touch the tokens, so that the driver's part shows. The number of samples is
fixed; responses grow up to 64 times.

``reference`` is the executor as it is: the driver holds row numbers. ``value`` is the same step where the driver reads
every batch (`RemoteBatch.fetch`) and gives it to the next call as it is. Medians over steps, of the driver alone: CPU
time of all its threads (Ray's too); kB that it serialises for calls and deserialises from answers; kB that its TCP
connections receive and send (Ray hands results below 100 kB to the process that asked for them,
larger ones go through shared memory). Last the seconds of a step, and the driver's peak memory so far.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.controller import Dispatch, dispatch
from rlcore.controller.placement import ResourcePool
from rlcore.metrics import Metrics

POOLS = {name: ResourcePool(processes=n, cpus_per_process=0.5) for name, n in {"train": 2, "gen": 1, "cpu": 1}.items()}
PLACEMENT = {"actor": "train", "rollout": "gen", "reward": "cpu", "compute": "cpu"}


class Policy:
    """Two ranks that read all tokens they are given."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        from torch import distributed as dist

        self.dp_rank, self.dp_size = dist.get_rank(), dist.get_world_size()

    @dispatch(Dispatch.SHARD, lazy=True)
    def forward(self, batch: Batch) -> Batch:
        return Batch({"logprobs": batch.jagged(batch.flat("tokens") * -1e-3)})

    @dispatch(Dispatch.SHARD)
    def train(self, batch: Batch) -> Metrics:
        metrics = Metrics()
        metrics.sum("advantage", (batch.flat("advantages") * batch.flat("loss_mask")).sum())
        return metrics


class Other:
    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.name = "toy"


def sample(engine: Other, jobs: Sequence[int], n: int, length: int) -> Iterator[tuple[list[int], Batch]]:
    """``n`` trajectories of ``length`` tokens for each job."""
    for place, job in enumerate(jobs):
        tokens = Jagged(torch.arange(n * length) % 997 + job, torch.full((n,), length))
        values = tokens.values.float()
        yield (
            [place],
            Batch(
                {
                    "tokens": tokens,
                    "loss_mask": tokens.with_values((values > 8).float()),
                    "rollout_logprobs": tokens.with_values(-values),
                    "group": torch.full((n,), job),
                    "response_length": torch.full((n,), length),
                    "messages": [[{"role": "user", "content": f"question {job}"}]] * n,
                }
            ),
        )


def score(engine: Other, batch: Batch) -> Batch:
    return Batch({"score": torch.stack([tokens.float().mean() for tokens in batch["tokens"].to_list()])})


def advantages(batch: Batch) -> Batch:
    per_token = batch.flat("logprobs") - batch.flat("ref_logprobs") + batch.flat("rollout_logprobs")
    return Batch({"advantages": batch.jagged(per_token)})


def step(executor: Any, roles: Any, held: Callable[[Any], Any], prompts: int, n: int, length: int) -> dict[str, float]:
    """One step; ``held`` is what the driver makes of a batch that it gets."""
    actor, rollout, reward = roles
    parts, scores = [], []
    for _, part in executor.stream(rollout, sample, list(range(prompts)), n, length):
        parts.append(held(part))
        scores.append(executor.submit(reward, score, parts[-1]))
    batch = type(parts[0]).concat(parts)
    scored = [held(pending.result()) for pending in scores]
    batch = batch.with_columns(score=torch.cat([part["score"] for part in scored]))
    inputs = batch.select("tokens", "loss_mask")
    batch = batch.with_columns(logprobs=held(actor.forward(inputs).select("logprobs"))["logprobs"])
    batch = batch.with_columns(ref_logprobs=held(actor.forward(inputs).select("logprobs"))["logprobs"])
    batch = batch.with_columns(advantages=held(executor.compute(advantages, batch))["advantages"])
    metrics = Metrics.merge(
        actor.train(part.select("tokens", "loss_mask", "advantages")) for part in batch.split(len(batch) // 2)
    )
    return metrics.to_dict()


def tcp_bytes() -> tuple[int, int]:
    """Received and sent by this process over the TCP connections that are open now (Linux: ``struct tcp_info``)."""
    received = sent = 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                        acknowledged, got = struct.unpack_from("QQ", info, 120)
                        received, sent = received + got, sent + acknowledged
    return received, sent


class Counted:
    """Counts what the driver serialises into calls and deserialises out of answers."""

    def __init__(self) -> None:
        from ray._private.serialization import SerializationContext

        self.out = self.into = 0
        serialize, deserialize = SerializationContext.serialize, SerializationContext.deserialize_objects

        def counting_serialize(context: Any, value: Any) -> Any:
            found = serialize(context, value)
            self.out += found.total_bytes
            return found

        def counting_deserialize(context: Any, data: Any, refs: Any, *rest: Any) -> Any:
            self.into += sum(len(body) for body, *_ in data if body is not None)
            return deserialize(context, data, refs, *rest)

        SerializationContext.serialize = counting_serialize
        SerializationContext.deserialize_objects = counting_deserialize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens per sample, before they grow")
    parser.add_argument("--growth", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--how", nargs="+", choices=["reference", "value"], default=["reference", "value"])
    parser.add_argument("--steps", type=int, default=7)
    arguments = parser.parse_args()

    import ray

    from rlcore_ray import RayExecutor, RemoteBatch

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def fetched(batch: Any) -> Any:
        return batch.fetch() if isinstance(batch, RemoteBatch) else batch

    executor = RayExecutor(POOLS, PLACEMENT, call_timeout_s=300)
    try:
        roles = [executor.build(role, kind, kind) for role, kind in
                 (("actor", Policy), ("rollout", Other), ("reward", Other))]  # fmt: skip
        executor.barrier()
        counted = Counted()
        print("| by | tokens per step | CPU, ms | calls, kB | answers, kB | TCP in, kB | TCP out, kB | step, s | MB |")
        print("|---|---|---|---|---|---|---|---|---|")
        for how in arguments.how:
            held = fetched if how == "value" else lambda batch: batch
            for growth in arguments.growth:
                length = arguments.length * growth
                rows = []
                for _ in range(arguments.steps + 2):
                    before = (time.perf_counter(), time.process_time(), counted.out, counted.into, *tcp_bytes())
                    step(executor, roles, held, arguments.prompts, arguments.n, length)
                    after = (time.perf_counter(), time.process_time(), counted.out, counted.into, *tcp_bytes())
                    rows.append([new - old for new, old in zip(after, before)])
                wall, cpu, *kilobytes = (statistics.median(column) for column in zip(*rows[2:]))
                tokens = arguments.prompts * arguments.n * length
                moved = " | ".join(f"{number / 1e3:,.0f}" for number in kilobytes)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"| {how} | {tokens:,} | {cpu * 1e3:.0f} | {moved} | {wall:.2f} | {peak:,.0f} |", flush=True)
    finally:
        executor.close()


if __name__ == "__main__":
    main()
