"""Clients of inference servers: timeouts that exclude pauses, aborts, labels of weights."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from rlcore.engines import GenerationRequest, SamplingParams
from rlcore_kit.serving import calls as calls_module
from rlcore_kit.serving.calls import Calls
from rlcore_kit.serving.pause_clock import PauseClock
from rlcore_kit.serving.server_api import ServerAPI
from rlcore_kit.serving.weight_labels import FRESH, UNKNOWN, WeightLabels

LONG_S = 100.0


def test_a_timeout_does_not_count_pauses():
    clock = PauseClock()

    async def scenario():
        clock.begin()
        asyncio.get_running_loop().call_later(0.6, clock.end)
        return await clock.with_timeout(0.3, asyncio.sleep(0.7, "done"))

    assert asyncio.run(scenario()) == "done"
    assert 0.6 <= clock.seconds() < LONG_S
    assert not clock.paused


def test_work_that_exceeds_its_timeout_is_cancelled():
    cancelled = []

    async def work():
        try:
            await asyncio.sleep(LONG_S)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def scenario():
        with pytest.raises(TimeoutError):
            await PauseClock().with_timeout(0.1, work())
        await asyncio.sleep(0)

    start = time.monotonic()
    asyncio.run(scenario())
    assert cancelled == [True]
    assert time.monotonic() - start < LONG_S


def test_a_failing_check_ends_the_wait_but_none_is_made_in_a_pause():
    clock, checks = PauseClock(), []

    async def check():
        checks.append(clock.paused)
        if len(checks) == 3:
            raise RuntimeError("hangs")

    async def scenario():
        clock.begin()
        asyncio.get_running_loop().call_later(0.3, clock.end)
        await clock.with_timeout(LONG_S, asyncio.sleep(LONG_S), check=check, check_every_s=0.05)

    with pytest.raises(RuntimeError, match="hangs"):
        asyncio.run(scenario())
    assert checks == [False] * 3


def test_begin_and_end_of_a_pause_are_idempotent():
    clock = PauseClock()
    clock.end()
    assert clock.seconds() == 0
    clock.begin()
    time.sleep(0.05)
    clock.begin()
    clock.end()
    paused_s = clock.seconds()
    clock.end()
    assert clock.seconds() == paused_s >= 0.05


def test_aborts_are_repeated_until_the_request_is_gone(monkeypatch):
    """One request is not sent yet, one is on its way, one is not aborted."""
    monkeypatch.setattr(calls_module, "REPEAT_ABORT_S", 0.02)
    sent_aborts = []

    async def abort(calls):
        sent_aborts.append([call.server_id for call in calls])

    async def scenario():
        calls = Calls(abort)
        gone = asyncio.Event()

        async def request(name, sent):
            with calls.begin(GenerationRequest([1], SamplingParams(1), request_id=name)) as call:
                call.server_id = f"server-{name}" if sent else ""
                await gone.wait()
                return call.aborted

        tasks = [asyncio.create_task(request(name, name != "waiting")) for name in ("waiting", "sent", "other")]
        await asyncio.sleep(0)
        await calls.abort(["waiting", "sent"])
        while len(sent_aborts) < 3:
            await asyncio.sleep(0.01)
        gone.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not list(calls)
        return results

    waiting, sent, other = asyncio.run(scenario())
    assert isinstance(waiting, asyncio.CancelledError)
    assert (sent, other) == (True, False)
    assert sent_aborts[:3] == [["server-sent"]] * 3


def test_an_abort_without_requests_reaches_no_server():
    async def abort(calls):
        raise AssertionError(calls)

    asyncio.run(Calls(abort).abort(None))


class RecordingServer(ServerAPI):
    """Records what it is asked for; its weights carry ``label``."""

    def __init__(self, label: str) -> None:
        self.label, self.actions = label, []
        self.connection = SimpleNamespace(url="url", wait_for=lambda work, what: asyncio.run(work))

    def weight_label(self) -> str:
        return self.label

    def set_weight_label(self, label: str) -> None:
        self.actions.append(label)

    def reload_model(self, timeout_s: float) -> None:
        self.actions.append("reload")

    def reset_prefix_cache(self) -> None:
        self.actions.append("reset")

    async def pause(self) -> None:
        self.actions.append("pause")

    async def resume(self) -> None:
        self.actions.append("resume")

    async def sleep(self) -> None:
        self.actions.append("sleep")

    async def wake(self) -> None:
        self.actions.append("wake")

    async def abort(self, server_ids) -> None:
        self.actions.append(tuple(server_ids))


@pytest.mark.parametrize(
    ("label", "known", "version", "actions"),
    [
        (FRESH, False, 0, ["ours:0", "resume"]),
        (FRESH, True, 0, ["ours:0", "resume"]),
        ("ours:0", True, 0, ["ours:0", "resume"]),
        ("ours:7", True, 7, ["resume"]),
        ("theirs:7", False, 0, ["reload", "ours:0", "resume"]),
        ("theirs:7", True, UNKNOWN, []),
        ("ours:updating", True, UNKNOWN, []),
    ],
)
def test_weights_of_a_server_at_the_handshake(label, known, version, actions):
    """Another run's weights are replaced once; a mixture, and what another run sent later, stays paused."""
    labels, server = WeightLabels("ours", {"url"} if known else set()), RecordingServer(label)
    assert labels.take_over(server, 1.0) == version
    assert server.actions == actions
    assert labels.known_servers == {"url"}
