"""The Ray cluster of a run: one that is started on this machine for the run, or an existing one."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray._private import ray_constants, services

from rlcore.controller.placement import ResourcePool
from rlcore.errors import ConfigError, WorkerError
from rlcore_ray.guard import Guard

_guards: list[Guard] = []
"""The guard of the cluster that this process started; at most one, as Ray has one cluster per process."""

CONNECT_S = 10.0
"""Timeout of the check that a cluster listens at an address."""
LOOPBACK = ("127.0.0.1:", "localhost:")

STARTS = 3
"""Attempts to start Ray (2.60), which gives its daemons 30 seconds; a very busy machine may exceed that once."""


def connect(address: str | None, pools: Mapping[str, ResourcePool]) -> bool:
    """Join the cluster at ``address``, or start one on this machine (``None``) that listens on loopback only.

    A cluster that is started here offers as many cores as ``pools`` need: more processes than cores are only slower.

    Returns:
        whether the caller should call `disconnect`; False if this process was connected already.

    Raises:
        ConfigError: there is no cluster at ``address``.
        WorkerError: Ray does not start on this machine.
    """
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        cpus = sum(pool.processes * pool.cpus_per_process for pool in pools.values())
        options["num_cpus"] = max(math.ceil(cpus), os.cpu_count() or 1)
        _start(options)
        return True
    try:
        found = services.get_ray_address_from_environment(address, None) if address == "auto" else address
        _check_answers(found)
        with _on_loopback() if found.startswith(LOOPBACK) else nullcontext():
            ray.init(address=found, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"controller.address={address}: there is no Ray cluster to connect to ({str(error).splitlines()[0]}); "
            "start one with 'ray start --head', or remove the address to run on this machine alone"
        ) from error
    return True


def _check_answers(address: str) -> None:
    """Raise OSError if nothing listens at ``address`` (host:port, or ray://host:port).

    Ray itself would retry for minutes. An address that ``auto`` found is checked too: Ray keeps the address of the last
    cluster that was started, whether it still runs or not.
    """
    address = address.removeprefix("ray://")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(f"nothing listens at {address}: {error}") from error


def _start(options: dict[str, Any], attempts: int = STARTS) -> None:
    _guards.append(Guard())
    try:
        with _on_loopback(), _guards[-1].marking():
            ray.init(
                address="local", include_dashboard=False, **options
            )  # never another cluster that runs on this machine
    except BaseException as error:
        disconnect()
        if not isinstance(error, Exception):
            raise
        if attempts == 1:
            raise WorkerError(f"Ray does not start on this machine: {error}; see its logs in /tmp/ray") from None
        _start(options, attempts - 1)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a cluster that is started in the context listen on 127.0.0.1 only.

    Ray (2.60) does so on macOS and Windows; on Linux it replaces 127.0.0.1 by the machine's address and listens on all
    interfaces, and this private constant is the only switch. Connecting to such a cluster needs it too.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def disconnect() -> None:
    """Disconnect from the cluster, which ends the run's workers, and end the cluster if `connect` started it."""
    try:
        ray.shutdown()
    finally:
        while _guards:
            _guards.pop().close()
