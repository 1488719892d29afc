"""Wait until a Ray cluster has a number of nodes: ``python wait_for_nodes.py 10.0.0.1:6379 8 [--timeout 600]``.

A run that requests more than the cluster has fails immediately, which is right for a complete cluster and wrong for one
that is still starting.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time

import ray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="host:port of the head")
    parser.add_argument("nodes", type=int, help="nodes to wait for, the head included")
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    arguments = parser.parse_args()
    address, wanted = arguments.address, arguments.nodes
    deadline = time.monotonic() + arguments.timeout
    while True:
        reason = ""
        try:
            there = alive_nodes(address)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:  # the head may still be starting
            there, reason = 0, f" ({str(error).splitlines()[0]})"
        if there >= wanted:
            break
        if time.monotonic() > deadline:
            sys.exit(f"{there} of {wanted} nodes joined {address} within {arguments.timeout:g} s{reason}")
        time.sleep(1)
    print(f"{there} nodes, {ray.cluster_resources().get('GPU', 0):g} GPUs")


def alive_nodes(address: str) -> int:
    """Nodes that are up; raises what Ray raises where there is no head."""
    if not ray.is_initialized():
        host, port = address.rsplit(":", 1)
        # Ray itself would wait for minutes where nothing listens yet
        socket.create_connection((host, int(port)), timeout=1).close()
        ray.init(address=address, log_to_driver=False, logging_level="error")
    return sum(node["Alive"] for node in ray.nodes())


if __name__ == "__main__":
    main()
