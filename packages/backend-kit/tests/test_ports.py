"""`unused_port` returns ports that the kernel does not give to connections."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rlcore_kit.serving import ports
from rlcore_kit.serving.ports import unused_port


def test_the_kernel_gives_the_port_to_no_connection() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {unused_port() for _ in range(20)}
    assert max(found) < first
    assert len(found) > 15


def test_a_port_in_use_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", unused_port())) as server:
        taken = server.getsockname()[1]
        free = unused_port()
        choices = iter([taken, taken, free])
        monkeypatch.setattr("random.SystemRandom.randrange", lambda *_: next(choices))
        assert unused_port() == free


@pytest.mark.parametrize("text", ["1024 65535\n", "", None])
def test_where_the_range_leaves_no_room_the_port_is_one_of_it(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "range"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(ports, "_RANGE_FILE", file)
    with socket.create_server(("127.0.0.1", unused_port())) as server:
        assert server.getsockname()[1] > 1023
