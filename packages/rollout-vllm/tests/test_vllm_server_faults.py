"""Servers that fail: a small HTTP server that answers like vLLM's, and injects faults."""

import json
import random
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from pydantic import ValidationError

from rlcore.engines import GenerationRequest, ModelSettings, RolloutSpec, SamplingParams, WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_vllm.server import build
from rlcore_vllm.server.settings import ServerSettings
from rlcore_vllm.settings import VLLMSettings

WAIT_S = 60


class HTTPPeer(ThreadingHTTPServer):
    """Answers as vLLM's server does (0.32); tokens are drawn by seed and prompt.

    Attributes:
        fault: what happens to requests for completions: "" none, "error" a 500 as of an engine that died, "reset" the
            connection is closed before the answer, "half" in the middle of it, "hang" no answer, "garbage" no JSON,
            "strange" JSON of another form, "refuse" a 400.
        good: number of completions before the fault begins.
        missing: paths that do not exist.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, **changes) -> None:
        self.fault, self.good, self.missing = "", 0, set()
        self.extended, self.label, self.paused, self.served = True, "default", False, ["policy"]
        self.asked: list[tuple[str, dict]] = []
        self.connections: list[socket.socket] = []
        self.released = threading.Event()
        vars(self).update(changes)
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def stop(self) -> None:
        """Close all connections, as if the process were killed."""
        self.released.set()
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that disconnect."""

    def completions(self) -> list[dict]:
        return [body for path, body in self.asked if path == "/inference/v1/generate"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HTTPPeer

    def log_message(self, *_) -> None:
        return

    def do_GET(self) -> None:
        self._route({})

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        self._route(json.loads(self.rfile.read(length)) if length else {})

    def _route(self, body: dict) -> None:
        peer, path = self.server, self.path.partition("?")[0]
        peer.asked.append((path, body))
        if path in peer.missing:
            self._answer({"detail": "Not Found"}, 404)
            return
        match path:
            case "/v1/models":
                self._answer({"data": [{"id": name, "root": "/far/away", "max_model_len": 64} for name in peer.served]})
            case "/weight_info":
                self._answer({"weight_version": peer.label})
            case "/update_weight_version":
                peer.label = body["new_version"]
                self._answer({"success": True})
            case "/get_world_size":
                self._answer({"world_size": 1})
            case "/collective_rpc":
                words = f"Worker failed with error ''Worker' object has no attribute '{body['method']}''"
                failure = {"error": {"message": words, "code": 500}}
                self._answer(*(({"results": ["0"]},) if peer.extended else (failure, 500)))
            case "/inference/v1/generate":
                self._generate(body)
            case _:
                self._answer({})

    def _generate(self, body: dict) -> None:
        peer = self.server
        if peer.good > 0:
            peer.good -= 1
            self._answer(self._completion(body))
            return
        match peer.fault:
            case "":
                self._answer(self._completion(body))
            case "error":
                self._answer({"error": {"message": "EngineCore encountered an issue.", "code": 500}}, 500)
            case "refuse":
                self._answer({"error": {"message": "top_k must be less than the vocabulary", "code": 400}}, 400)
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.close_connection = True
                self.connection.close()
            case "half":
                self.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"choices": [')
                self.close_connection = True
            case "hang":
                peer.released.wait(WAIT_S)
                self.close_connection = True
            case "garbage":
                self._send(b"<html>gateway</html>", 200)
            case "strange":
                self._answer({"choices": [{"text": "no tokens"}]})

    def _completion(self, body: dict) -> dict:
        wanted = body["sampling_params"]
        tokens = drawn(wanted["seed"], body["token_ids"], wanted["max_tokens"])
        return {
            "choices": [
                {
                    "token_ids": tokens,
                    "finish_reason": "length",
                    "logprobs": {"content": [{"token_id": token, "logprob": -1.5} for token in tokens]},
                    "weight_versions": [{"version": self.server.label, "start": 0, "end": len(tokens)}],
                }
            ]
        }

    def _answer(self, answer: dict, status: int = 200) -> None:
        self._send(json.dumps(answer).encode(), status)

    def _send(self, content: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def drawn(seed: int, prompt: list[int], count: int) -> list[int]:
    dice = random.Random(repr((seed, prompt)))
    return [dice.randrange(200) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "policy")


@pytest.fixture
def engines(model):
    """``engines(peers, **settings)`` is the engine over them."""
    built = []

    def make(*urls: str, **settings):
        server = ServerSettings(
            urls=urls,
            **{"retries": 1, "connect_timeout_s": 2.0, "rejoin_timeout_s": 1.0, "timeout_s": 30.0, **settings},
        )
        spec = RolloutSpec(ModelSettings(path=str(model)), VLLMSettings(mode="server", server=server), 64)
        built.append(build(spec))
        return built[-1]

    yield make
    for engine in built:
        engine.close()


@contextmanager
def peers(count: int = 1, **changes):
    started = [HTTPPeer(**changes) for _ in range(count)]
    try:
        yield started
    finally:
        for peer in started:
            peer.stop()


def request(index: int = 0) -> GenerationRequest:
    return GenerationRequest([5, 6, index], SamplingParams(8, seed=index), request_id=str(index))


def generated_by_seed(requests, completions) -> bool:
    return [completion.tokens for completion in completions] == [
        drawn(asked.sampling.seed, list(asked.prompt), 8) for asked in requests
    ]


# --- a server that fails ---------------------------------------------------------------------------------------------

FAULTS = {
    "error": r"failed to complete request '0' \(500\): EngineCore encountered an issue\.",
    "reset": r"closed the connection before it could complete request '0'",
    "half": r"closed the connection before it could complete request '0'",
    "hang": r"did not complete request '0' within 1 s \(timeout_s\): its health endpoint answers, so its engine hangs",
    "garbage": r"did not answer in JSON when asked to complete request '0': '<html>gateway</html>'",
    "strange": r"sent an answer that is not in the format of /inference/v1/generate",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_clear_message(engines, fault):
    with peers(fault=fault) as (peer,):
        engine = engines(peer.url, timeout_s=1.0)
        with pytest.raises(EngineError, match=f"{peer.url}.*{FAULTS[fault]}"):
            engine.generate_batch([request()])


@pytest.mark.parametrize("fault", FAULTS)
def test_another_server_takes_over_unfinished_requests(engines, fault):
    """Requests that were finished before the fault are sent once, others of the broken server once more."""
    with peers(2) as (broken, sound):
        engine = engines(broken.url, sound.url, timeout_s=2.0)
        requests = [request(index) for index in range(16)]
        completions = engine.generate_batch(requests[:6])
        broken.fault = fault
        completions += engine.generate_batch(requests[6:])
        assert generated_by_seed(requests, completions)
        assert all(completion.versions == [(0, 8)] for completion in completions)
        asked = Counter(body["token_ids"][2] for peer in (broken, sound) for body in peer.completions())
        assert all(asked[index] == 1 for index in range(6))
        assert all(body["token_ids"][2] < 6 for body in broken.completions()[:3])
        assert {body["token_ids"][2] for body in sound.completions()} >= set(range(6, 16))


def test_a_refused_request_does_not_drain_the_server(engines):
    with peers(fault="refuse") as (peer,):
        engine = engines(peer.url)
        with pytest.raises(EngineError, match=r"refuses to complete request '0' \(400\): top_k must be less"):
            engine.generate_batch([request()])
        peer.fault = ""
        assert generated_by_seed([request()], engine.generate_batch([request()]))


def test_a_restarted_server_gets_requests_again(engines):
    """At version 0 it does so immediately; after an update it would wait for the next one."""
    with peers(2) as (first, second):
        engine = engines(first.url, second.url, rejoin_timeout_s=20.0)
        first.stop()
        requests = [request(index) for index in range(8)]
        assert generated_by_seed(requests, engine.generate_batch(requests))
        assert first.url in engine.reasons
        again = HTTPPeer(first.port)
        try:
            deadline = time.monotonic() + WAIT_S
            while engine.reasons:
                assert time.monotonic() < deadline, engine.reasons
                time.sleep(0.1)
            assert generated_by_seed(requests, engine.generate_batch(requests))
            assert again.completions()
        finally:
            again.stop()


def test_requests_fail_if_no_server_comes_back(engines):
    with peers() as (peer,):
        engine = engines(peer.url)
        peer.stop()
        with pytest.raises(
            EngineError, match=rf"no rollout replica is left .*{peer.url}: {peer.url} accepts no connection"
        ):
            engine.generate_batch([request()])


def test_a_request_is_not_sent_twice_to_a_server(engines):
    """After a failure another server gets it; but a kept connection that was closed before is replaced."""
    with peers(2) as (broken, sound):
        engine = engines(broken.url, sound.url, retries=3)
        broken.fault = "half"
        engine.generate_batch([request(index) for index in range(2)])
        assert len(broken.completions()) == 1
    with peers() as (peer,):
        engine = engines(peer.url)
        for connection in peer.connections:
            connection.shutdown(socket.SHUT_RDWR)
        assert generated_by_seed([request()], engine.generate_batch([request()]))
        assert engine.reasons == {}


# --- a server that cannot serve training -----------------------------------------------------------------------------


def test_an_unreachable_server_is_an_error(engines):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with peers() as (peer,), pytest.raises(EngineError, match=rf"1 of 2 .* {url} accepts no connection"):
        engines(peer.url, url)


def test_a_server_without_the_options_for_training_is_refused(engines):
    start = "start it with VLLM_SERVER_DEV_MODE=1 .* --enable-scale-out and --worker-extension-cls rlcore_vllm"
    with peers(missing={"/weight_info"}) as (peer,), pytest.raises(EngineError, match=f"cannot be controlled; {start}"):
        engines(peer.url)
    with peers(extended=False) as (peer,), pytest.raises(EngineError, match=f"without rlcore's extension.*{start}"):
        engines(peer.url)


def test_one_of_several_models_must_be_chosen(engines):
    with peers(served=["policy", "judge"]) as (peer,):
        with pytest.raises(EngineError, match="serves policy, judge; choose one with model_name"):
            engines(peer.url)
        engine = engines(peer.url, model_name="judge")
        engine.generate_batch([request()])
        assert peer.completions()[0]["model"] == "judge"


def test_a_refused_update_ends_before_the_server_is_paused(engines):
    """The server does not let its workers connect: no bucket is consumed for it, and no call waits."""
    with peers() as (peer,):
        engine = engines(peer.url)
        peer.extended = False
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"failed to connect its workers for weights \(500\)"):
            engine.update_weights([WeightBucket((("w", torch.zeros(2)),))], 1)
        assert time.monotonic() - start < 20
        assert not any(path == "/pause" for path, _ in peer.asked)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ["http://10.1.2.3:8000"]}, "http://10.1.2.3:8000 is not on this machine; set allow_remote"),
        ({"urls": ["http://example.org"]}, "http://example.org is not on this machine"),
        ({"urls": ["localhost:8000"]}, "'localhost:8000' is not the URL of a server; write http://host:port"),
        ({"urls": ["http://localhost:1/", "http://localhost:1"]}, "urls names a server twice"),
        ({"urls": []}, "urls"),
        ({"urls": ["http://localhost:1"], "weights": "reload"}, "weights 'reload' needs weights_dir"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ServerSettings(**settings)


def test_loopback_and_allowed_remote_urls_are_accepted():
    urls = ("http://localhost:1", "http://127.0.0.2:2", "http://[::1]:3")
    assert ServerSettings(urls=urls).urls == urls
    assert ServerSettings(urls=["https://gpu-7.example.org/v"], allow_remote=True).urls[0].startswith("https")
