"""Process groups with a store of the caller's, registered nowhere: the default group belongs to the trainer."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

# torch.distributed exports these without declaring them.
c10d: Any = torch.distributed


def listening_store(host: str, timeout_s: float) -> tuple[Any, int]:
    """Return a TCPStore that listens on ``host`` alone, and its port; TCPStore by itself listens on all interfaces."""
    with socket.create_server((host, 0)) as listener:
        port = listener.getsockname()[1]
        store = c10d.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
    return store, port


def connected_store(host: str, port: int, timeout_s: float) -> Any:
    """Return a client of the TCPStore that listens at ``host`` and ``port``."""
    return c10d.TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def prefixed(store: Any, *prefixes: str) -> Any:
    """Return ``store`` wrapped into one prefix after the other; the last one comes first in keys."""
    for prefix in prefixes:
        store = c10d.PrefixStore(prefix, store)
    return store


def nccl_group(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """Return an NCCL process group on the current CUDA device; blocks until all ranks have joined."""
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return c10d.ProcessGroupNCCL(store, rank, size, options)


def gloo_group(store: Any, rank: int, size: int, host: str, timeout_s: float) -> Any:
    """Return a gloo process group that listens on ``host``; blocks until all ranks have joined.

    The device makes GLOO_SOCKET_IFNAME unnecessary, which would apply to the trainer's groups too.
    """
    gloo = c10d.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    return gloo(store, rank, size, options)


def broadcast(group: Any, tensor: torch.Tensor) -> Any:
    """Start to broadcast ``tensor`` from rank 0; return the work to wait for."""
    options = c10d.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    options.asyncOp = True
    return group.broadcast([tensor], options)
