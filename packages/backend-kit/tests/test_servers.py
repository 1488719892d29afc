"""Clients of inference servers: timeouts that exclude pauses, aborts, labels of weights, the shared rollout engine."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from rlcore.engines import Completion, GenerationRequest, ModelSettings, RolloutSpec, SamplingParams
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving import calls as calls_module
from rlcore_kit.serving.calls import Calls
from rlcore_kit.serving.connection import Overloaded
from rlcore_kit.serving.handshake import Handshake
from rlcore_kit.serving.pause_clock import PauseClock
from rlcore_kit.serving.server_api import ServerAPI
from rlcore_kit.serving.server_rollout import ServerRollout, open_connection
from rlcore_kit.serving.settings import ServerClientSettings
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

    def __init__(self, label: str, connection=None) -> None:
        self.label, self.actions = label, []
        self.connection = connection or SimpleNamespace(url="url", wait_for=lambda work, what: asyncio.run(work))

    def weight_label(self) -> str:
        return self.label

    def set_weight_label(self, label: str) -> None:
        self.label = label
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


class EchoRollout(ServerRollout):
    """Completes every request with its prompt, and records the order in which the server is used."""

    failure: Exception | None = None

    async def _complete(self, call) -> Completion:
        await self._admit(call)
        self.api.actions.append("generate")
        return Completion(list(call.request.prompt), [], "stop", [(self.version, len(call.request.prompt))])

    def _prepare_update(self, buckets):
        self.api.actions.append("prepare")
        return buckets

    def _send_weights(self, buckets, version) -> None:
        self.api.actions.append(list(buckets))
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def echo():
    """A client of a server that exists as a record only; its connection is never used for HTTP."""
    labels = WeightLabels("ours")
    settings = ServerClientSettings(timeout_s=LONG_S)
    api = RecordingServer("ours:0", open_connection("http://127.0.0.1:9", settings, None))
    spec = RolloutSpec(ModelSettings(path="anywhere"), None, 64)
    client = EchoRollout(api, Handshake(0, 1, 100, frozenset()), spec, settings, labels)
    yield client
    client.close()


def request(index: int) -> GenerationRequest:
    return GenerationRequest([1, 2, index], SamplingParams(4), request_id=str(index))


def test_requests_wait_in_this_process_while_the_server_is_paused(echo):
    async def scenario():
        echo.pause()
        waiting = [asyncio.create_task(echo.generate(request(index))) for index in range(2)]
        await asyncio.sleep(0.1)
        assert echo.api.actions == ["pause"]
        await asyncio.to_thread(echo.abort, ["0"])
        await asyncio.to_thread(echo.resume)
        return await asyncio.gather(*waiting)

    aborted, completed = asyncio.run(scenario())
    assert (aborted.tokens, aborted.finish_reason) == ([], "abort")
    assert completed.tokens == [1, 2, 1]
    assert echo.api.actions == ["pause", "resume", "generate"]


def test_a_request_wakes_a_sleeping_server(echo):
    echo.sleep()
    echo.sleep()
    echo.generate_batch([request(0)])
    assert echo.api.actions == ["sleep", "wake", "resume", "generate"]


def test_an_update_pauses_labels_sends_and_resumes(echo):
    echo.update_weights(["bucket"], 3)
    assert echo.version == 3
    assert echo.api.actions == ["prepare", "pause", "ours:updating", ["bucket"], "reset", "ours:3", "resume"]
    assert echo.generate_batch([request(0)])[0].versions == [(3, 3)]


def test_an_update_of_a_paused_server_leaves_it_paused(echo):
    echo.pause()
    echo.update_weights([], 1)
    assert echo.api.actions[-1] == "ours:1"
    echo.resume()
    assert echo.api.actions[-1] == "resume"


def test_a_failed_update_leaves_the_server_paused_with_a_label_of_no_version(echo):
    echo.failure = WorkerError("connection reset")
    with pytest.raises(WorkerError, match="connection reset"):
        echo.update_weights([], 1)
    assert echo.api.label == "ours:updating"
    assert "resume" not in echo.api.actions
    echo.failure = None
    echo.update_weights([], 2)
    assert echo.api.actions[-1] == "resume"


# --- streams ---------------------------------------------------------------------------------------------------------


class Events(BaseHTTPRequestHandler):
    """Answers with the status that the body names, or streams two events and a comment."""

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(wanted["status"])
        self.send_header("retry-after", "1.5")
        self.end_headers()
        self.wfile.write(b'data: {"token": 1}\n\n: kept alive\n\ndata:{"token": 2}\r\n\r\n' + wanted["end"].encode())

    def log_message(self, *_):
        return


@pytest.fixture
def connection():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Events)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    opened = open_connection(f"http://127.0.0.1:{server.server_address[1]}", ServerClientSettings(), None, {"X-A": "b"})
    yield opened
    opened.close()
    server.shutdown()
    server.server_close()


def events_of(connection, status=200, end="data: [DONE]\n\n"):
    async def read():
        return [event async for event in connection.events("/stream", "count", body={"status": status, "end": end})]

    return connection.wait_for(read(), "count")


def test_a_stream_is_its_events(connection):
    assert events_of(connection) == [{"token": 1}, {"token": 2}]


def test_an_event_may_hold_characters_at_which_text_has_line_ends(connection):
    """JSON needs no escape for U+2028 and U+0085, and models write them."""
    text = "a\u2028b\u2029c\x85d"
    assert events_of(connection, end=f'data: {{"text": "{text}"}}')[-1] == {"text": text}


def test_failures_of_a_stream(connection):
    with pytest.raises(WorkerError, match="sent an event that is not JSON when asked to count: ' nonsense'"):
        events_of(connection, end="data: nonsense\n\n")
    with pytest.raises(EngineError, match="refuses to count"):
        events_of(connection, status=422)
    with pytest.raises(Overloaded) as overloaded:
        events_of(connection, status=429)
    assert overloaded.value.retry_after_s == 1.5
