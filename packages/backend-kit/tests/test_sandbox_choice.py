"""The choice of a way to make sandboxes, and the refusal where none works."""

from __future__ import annotations

import pytest

from rlcore_kit.sandbox import detection
from rlcore_kit.sandbox.detection import WAYS, fault, open_sandbox, working_way
from rlcore_kit.sandbox.session import SandboxError


def test_a_machine_without_sandbox_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        detection, "WAYS", {"bwrap": lambda plan: ["/no/such/bwrap"], "broken": lambda plan: ["/bin/false"]}
    )

    with pytest.raises(SandboxError) as refused:
        working_way.__wrapped__()

    assert "/no/such/bwrap cannot be started: No such file or directory" in str(refused.value)
    assert "broken: the sandbox did not start" in str(refused.value)
    assert "apt-get install bubblewrap" in str(refused.value)


def test_first_way_that_works_is_used_or_none_is_opened() -> None:
    working = [way for way in WAYS if not fault(way)]
    if working:
        assert working_way() == working[0]
        with open_sandbox() as sandbox:
            assert sandbox.run_code("6 * 7").stdout == "42\n"
    else:
        with pytest.raises(SandboxError, match="runs in a sandbox only, and this machine allows none"):
            open_sandbox()


def test_a_way_that_does_not_limit_processes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "PROBE", "raise AssertionError('the number of its processes is not limited')")

    for way in WAYS:
        said = fault(way)
        assert said.endswith("the number of its processes is not limited") or "start" in said
