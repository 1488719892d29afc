"""Program that Ray starts in the place of its worker program: ask the `ForkServer` for a process that runs that one.

It imports little, because it starts once per worker.
"""

import json
import os
import socket
import sys

if __name__ == "__main__":
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["RLCORE_FORK_SERVER"])
    argv = [os.environ["RLCORE_FORK_SCRIPT"], *sys.argv[1:]]
    order = {"argv": argv, "environ": dict(os.environ), "cwd": os.getcwd(), "new_session": False}
    socket.send_fds(server, [json.dumps(order).encode() + b"\n"], [0, 1, 2])
    server.recv(64)
