"""What clients of inference servers share: a clock that stops while a server stands still, and aborts."""

import asyncio
import time

import pytest

from rlcore.engines import GenerationRequest, SamplingParams
from rlcore_kit.serving import calls as calls_module
from rlcore_kit.serving.calls import Calls
from rlcore_kit.serving.standstill import Standstill
from rlcore_kit.serving.versions import FRESH, UNKNOWN, Versions

LONG_S = 100.0


def test_work_may_take_its_time_beside_standstills():
    clock = Standstill()

    async def scenario():
        clock.begin()
        asyncio.get_running_loop().call_later(0.6, clock.end)
        return await clock.within(0.3, asyncio.sleep(0.7, "done"))

    assert asyncio.run(scenario()) == "done"
    assert 0.6 <= clock.seconds() < LONG_S
    assert not clock.lasts


def test_work_that_takes_too_long_is_cancelled():
    cancelled = []

    async def work():
        try:
            await asyncio.sleep(LONG_S)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def scenario():
        with pytest.raises(TimeoutError):
            await Standstill().within(0.1, work())
        await asyncio.sleep(0)

    start = time.monotonic()
    asyncio.run(scenario())
    assert cancelled == [True]
    assert time.monotonic() - start < LONG_S


def test_looking_ends_the_waiting_but_not_in_a_standstill():
    clock, looks = Standstill(), []

    async def look():
        looks.append(clock.lasts)
        if len(looks) == 3:
            raise RuntimeError("hangs")

    async def scenario():
        clock.begin()
        asyncio.get_running_loop().call_later(0.3, clock.end)
        await clock.within(LONG_S, asyncio.sleep(LONG_S), look=look, look_every_s=0.05)

    with pytest.raises(RuntimeError, match="hangs"):
        asyncio.run(scenario())
    assert looks == [False] * 3


def test_a_standstill_is_begun_and_ended_once():
    clock = Standstill()
    clock.end()
    assert clock.seconds() == 0
    clock.begin()
    time.sleep(0.05)
    clock.begin()
    clock.end()
    stood = clock.seconds()
    clock.end()
    assert clock.seconds() == stood >= 0.05


def test_aborts_are_repeated_until_the_request_is_gone(monkeypatch):
    """One request is not sent yet, one is on its way, one is another's: who is told what."""
    monkeypatch.setattr(calls_module, "INSIST_S", 0.02)
    told = []

    async def abort(calls):
        told.append([call.server_id for call in calls])

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
        while len(told) < 3:
            await asyncio.sleep(0.01)
        gone.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not list(calls)
        return results

    waiting, sent, other = asyncio.run(scenario())
    assert isinstance(waiting, asyncio.CancelledError)
    assert (sent, other) == (True, False)
    assert told[:3] == [["server-sent"]] * 3


def test_an_abort_of_nothing_tells_nobody():
    async def abort(calls):
        raise AssertionError(calls)

    asyncio.run(Calls(abort).abort(None))


@pytest.mark.parametrize(
    ("label", "greeted", "version", "done"),
    [
        (FRESH, False, 0, ["ours:0", "go on"]),
        (FRESH, True, 0, ["ours:0", "go on"]),
        ("ours:0", True, 0, ["ours:0", "go on"]),
        ("ours:7", True, 7, ["go on"]),
        ("theirs:7", False, 0, ["read again", "ours:0", "go on"]),
        ("theirs:7", True, UNKNOWN, []),
        ("ours:updating", True, UNKNOWN, []),
    ],
)
def test_what_a_server_holds_when_it_is_met(label, greeted, version, done):
    """Another run's weights give way once; a mixture, and what came later from elsewhere, stays paused."""
    versions = Versions("ours", {"url"} if greeted else set())
    told = []
    found = versions.adopt(
        "url",
        label,
        read_again=lambda: told.append("read again"),
        name=told.append,
        go_on=lambda: told.append("go on"),
    )
    assert (found, told) == (version, done)
    assert versions.greeted == {"url"}
