"""`WeightLink`: weights from a trainer's processes into rollout processes of another pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rlcore.engines.settings import WeightSyncSettings
from rlcore.engines.weight_sync import export
from rlcore.errors import WorkerDied
from rlcore_kit.weight_transfer import Address, TransferStats, open_receiver, open_sender
from rlcore_ray.answers import PendingCall, raise_failure
from rlcore_ray.calls import Engines, Response
from rlcore_ray.role_workers import Role
from rlcore_ray.workers import Workers

ATTEMPTS = 3
"""Maximum attempts of one synchronisation; a rollout process that dies in every attempt ends the run."""


class WeightLink:
    """A connection from the first process of a trainer to every process of a rollout, kept between synchronisations.

    It is opened again after a rollout process was replaced; the next transfer is then a full one.
    """

    def __init__(self, workers: Workers, trainer: Role, rollout: Role, settings: WeightSyncSettings) -> None:
        self._workers = workers
        self._trainer = trainer
        self._rollout = rollout
        self._settings = settings
        self._adapters = False  # whether the rollout takes adapters, as it says when the link is opened
        self._connected: list[Any] = []  # the rollout's processes when the link was opened

    def sync(self, version: int) -> TransferStats:
        """Transfer the trainer's weights to all rollout processes; one that is dead is replaced first.

        Raises:
            WorkerDied: a trainer's process is gone, or a rollout process died in each of `ATTEMPTS`.
            WorkerError: the transfer failed.
        """
        for attempt in range(ATTEMPTS):
            last = attempt + 1 == ATTEMPTS
            if self._connected != self._rollout.pool.workers and not self._open(last):
                continue
            name = "export_adapters" if self._adapters else "export_weights"
            args = version, self._settings.bucket_mb << 20, self._adapters
            sent = self._call_all(self._trainer, "engine", name, partial(_send, self._trainer.name), *args)
            receive = partial(_receive, self._rollout.name)
            received = self._call_all(self._rollout, "control", "update_weights", receive)
            responses = self._workers.waiter.collect([*sent, *received])
            if self._succeeded([*sent, *received], responses, last):
                assert isinstance(responses[0], Response)
                return responses[0].value  # type: ignore[no-any-return]
        raise AssertionError("unreachable")

    def _succeeded(self, calls: list[PendingCall], responses: list[Response | Exception], last: bool) -> bool:
        """Return whether all calls succeeded; if not, replace dead rollout processes for another attempt.

        Raises:
            RlcoreError: a failure, if no rollout process is dead, or in the last attempt.
        """
        if not any(isinstance(response, Exception) or response.failure is not None for response in responses):
            return True
        self._connected = []
        dead = [
            (call, response)
            for call, response in zip(calls, responses)
            if isinstance(response, Exception) and call.pool is self._rollout.pool
        ]
        if not dead or last:
            _raise_first(calls, responses)
        for call, error in dead:
            self._workers.replace(call, error, catch_up=False)
        return False

    def _open(self, last: bool) -> bool:
        """Connect with all rollout processes; return False if some had to be replaced."""
        processes = list(self._rollout.pool.workers)
        host = self._trainer.pool.locations[0].host
        args = self._trainer.name, self._settings, len(processes), host
        opened = self._call(self._trainer, 0, "engine", "open_sender", _open_sender, *args)
        address: Address = self._workers.waiter.wait([opened])[0].value
        calls = [
            self._call(
                self._rollout, rank, "control", "open_receiver", _open_receiver, self._rollout.name, address, rank
            )
            for rank in range(len(processes))
        ]
        responses = self._workers.waiter.collect(calls)
        if not self._succeeded(calls, responses, last):
            return False
        self._adapters = any(isinstance(response, Response) and response.value for response in responses)
        self._connected = processes
        return True

    def _call_all(
        self, role: Role, concurrency_group: str, name: str, work: Callable[..., Any], *args: Any
    ) -> list[PendingCall]:
        return [self._call(role, rank, concurrency_group, name, work, *args) for rank in range(len(role.pool))]

    def _call(
        self, role: Role, rank: int, concurrency_group: str, name: str, work: Callable[..., Any], *args: Any
    ) -> PendingCall:
        return self._workers.call(role.pool, rank, concurrency_group, name, work, args)


def _raise_first(calls: list[PendingCall], responses: list[Response | Exception]) -> None:
    """Raise a death, or else the failure that happened first."""
    for call, response in zip(calls, responses):
        if isinstance(response, Exception):
            raise WorkerDied(f"{call.title} is gone: {response}") from response
    failed = [
        (found.event.end, call, found.failure) for call, found in zip(calls, responses) if isinstance(found, Response)
    ]
    for _, call, failure in sorted(failed, key=lambda item: item[0]):
        if failure is not None:
            raise_failure(call.title, failure)


def _open_sender(engines: Engines, role: str, settings: WeightSyncSettings, receivers: int, host: str) -> Address:
    if engines.sender is not None:
        engines.sender.close()
    engines.sender, address = open_sender(
        settings.transport,
        receivers=receivers,
        host=host,
        timeout_s=settings.timeout_s,
        bucket_bytes=settings.bucket_mb << 20,
        delta=settings.delta,
        device=engines[role].device,
    )
    return address


def _open_receiver(engines: Engines, role: str, address: Address, rank: int) -> bool:
    """Open the receiving end and return whether the rollout takes adapters."""
    if engines.receiver is not None:
        engines.receiver.close()
    engines.receiver = open_receiver(address, rank)
    return bool(engines[role].takes_adapters)


def _send(role: str, engines: Engines, version: int, bucket_bytes: int, adapters: bool) -> TransferStats | None:
    """Export weights in a process of the trainer: all processes take part, the one with the sender sends them."""
    buckets = export(engines[role], bucket_bytes, adapters=adapters)
    if engines.sender is not None:
        return engines.sender.send(buckets, version)
    for _ in buckets:
        pass
    return None


def _receive(role: str, engines: Engines) -> int:
    assert engines.receiver is not None
    return engines.receiver.load_into(engines[role])
