"""Weights from a trainer's processes into rollout processes of another pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from rlcore.engines.settings import WeightSyncSettings
from rlcore.engines.weight_sync import export
from rlcore.errors import WorkerDied
from rlcore_kit.weight_transfer import Address, TransferStats, open_receiver, open_sender
from rlcore_ray.answers import Asked, raise_failure
from rlcore_ray.calls import Head
from rlcore_ray.pool import Pool

if TYPE_CHECKING:
    from rlcore_ray.executor import RayExecutor

ATTEMPTS = 3
"""Syncs that are tried before a rollout process that keeps dying ends the run."""


class WeightLink:
    """A connection between the first process of a trainer and every process of a rollout, kept between syncs.

    It is opened anew when a rollout process was replaced; the weights then go in full.
    """

    def __init__(self, executor: RayExecutor, trainer: Any, rollout: Any, settings: WeightSyncSettings) -> None:
        self._executor = executor
        self._trainer: Pool = trainer._pool
        self._trainer_role: str = trainer._role
        self._rollout: Pool = rollout._pool
        self._rollout_role: str = rollout._role
        self._settings = settings
        self._adapters = False  # what the rollout takes instead of whole weights, as it says when the link is opened
        self._connected: list[Any] = []  # the rollout's processes when the link was opened

    def sync(self, version: int) -> TransferStats:
        """Give the trainer's weights to all rollout processes; one that is dead is replaced first.

        Raises:
            WorkerDied: a trainer's process is gone, or a rollout process dies again and again.
            WorkerError: the transfer failed.
        """
        for attempt in range(ATTEMPTS):
            last = attempt + 1 == ATTEMPTS
            if self._connected != self._rollout.workers and not self._open(last):
                continue
            sent = self._ask_all(
                self._trainer,
                "engine",
                "export_adapters" if self._adapters else "export_weights",
                partial(_send, self._trainer_role),
                version,
                self._settings.bucket_mb << 20,
                self._adapters,
            )
            received = self._ask_all(self._rollout, "control", "update_weights", partial(_receive, self._rollout_role))
            heads = self._executor.waiter.collect([*sent, *received])
            if self._fine([*sent, *received], heads, last):
                assert isinstance(heads[0], Head)
                return heads[0].value  # type: ignore[no-any-return]
        raise AssertionError("unreachable")

    def _fine(self, asked: list[Asked], heads: list[Head | Exception], last: bool) -> bool:
        """Whether all did what they were asked; if not, dead rollout processes are replaced for another attempt.

        Raises:
            RlcoreError: what went wrong, if no rollout process is dead, or in the last attempt.
        """
        if not any(isinstance(head, Exception) or head.failure is not None for head in heads):
            return True
        self._connected = []
        dead = [
            (call, head)
            for call, head in zip(asked, heads)
            if isinstance(head, Exception) and call.pool is self._rollout
        ]
        if not dead or last:
            self._raise(asked, heads)
        for call, head in dead:
            self._executor.replace(call.pool, call.rank, call.worker, call.title, head, catch_up=False)
        return False

    def _open(self, last: bool) -> bool:
        """Connect with all rollout processes; False if some had to be replaced."""
        workers = list(self._rollout.workers)
        opened = self._executor.waiter.wait(
            [
                self._ask(
                    self._trainer,
                    0,
                    "engine",
                    "open_sender",
                    _open_sender,
                    self._trainer_role,
                    self._settings,
                    len(workers),
                    self._trainer.places[0].host,
                )
            ]
        )
        address: Address = opened[0].value
        asked = [
            self._ask(
                self._rollout, rank, "control", "open_receiver", _open_receiver, self._rollout_role, address, rank
            )
            for rank in range(len(workers))
        ]
        heads = self._executor.waiter.collect(asked)
        if not self._fine(asked, heads, last):
            return False
        self._adapters = any(isinstance(head, Head) and head.value for head in heads)
        self._connected = workers
        return True

    def _ask_all(self, pool: Pool, lane: str, name: str, work: Callable[..., Any], *args: Any) -> list[Asked]:
        return [self._ask(pool, rank, lane, name, work, *args) for rank in range(len(pool))]

    def _ask(self, pool: Pool, rank: int, lane: str, name: str, work: Callable[..., Any], *args: Any) -> Asked:
        return self._executor.ask(pool, rank, lane, name, work, args)

    def _raise(self, asked: list[Asked], heads: list[Head | Exception]) -> None:
        for call, head in zip(asked, heads):
            if isinstance(head, Exception):
                raise WorkerDied(f"{call.title} is gone: {head}") from head
        failed = [(head.event.end, call, head.failure) for call, head in zip(asked, heads) if isinstance(head, Head)]
        for _, call, failure in sorted(failed, key=lambda item: item[0]):
            if failure is not None:
                raise_failure(call.title, failure)


_SENDER = "weight sender"
_RECEIVER = "weight receiver"


def _open_sender(
    engines: dict[str, Any], role: str, settings: WeightSyncSettings, receivers: int, host: str
) -> Address:
    if _SENDER in engines:
        engines.pop(_SENDER).close()
    sender, address = open_sender(
        settings.transport,
        receivers=receivers,
        host=host,
        timeout_s=settings.timeout_s,
        bucket_bytes=settings.bucket_mb << 20,
        delta=settings.delta,
        device=engines[role].device,
    )
    engines[_SENDER] = sender
    return address


def _open_receiver(engines: dict[str, Any], role: str, address: Address, rank: int) -> bool:
    """Whether the rollout takes adapters."""
    if _RECEIVER in engines:
        engines.pop(_RECEIVER).close()
    engines[_RECEIVER] = open_receiver(address, rank)
    return bool(engines[role].takes_adapters)


def _send(role: str, engines: dict[str, Any], version: int, bucket_bytes: int, adapters: bool) -> TransferStats | None:
    """In every process of the trainer: all take part in the export, the first sends."""
    buckets = export(engines[role], bucket_bytes, adapters=adapters)
    if _SENDER in engines:
        return engines[_SENDER].send(buckets, version)  # type: ignore[no-any-return]
    for _ in buckets:
        pass
    return None


def _receive(role: str, engines: dict[str, Any]) -> int:
    return engines[_RECEIVER].load_into(engines[role])  # type: ignore[no-any-return]
