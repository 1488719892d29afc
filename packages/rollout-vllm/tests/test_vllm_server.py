"""A real ``vllm serve``, started once: conformance, weight updates by every method, versions, several servers."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlcore import plugins
from rlcore.engines import (
    GenerationRequest,
    ModelSettings,
    RolloutEngine,
    RolloutSpec,
    SamplingParams,
    ScoringRequest,
    ScoringSpec,
)
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.serving.ports import unused_port
from rlcore_kit.serving.replicas import Replicas
from rlcore_kit.serving.weight_labels import UNKNOWN, WeightLabels
from rlcore_kit.testing.adapters import merged_model, random_adapters
from rlcore_kit.testing.rollout_engine import PROMPT, RolloutEngineConformance
from rlcore_kit.testing.scoring_engine import MOST, ScoringEngineConformance
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_vllm.server import build
from rlcore_vllm.server.rollout import connect
from rlcore_vllm.server.settings import ServerSettings
from rlcore_vllm.settings import VLLMSettings

START_S = 600
MAX_MODEL_LEN = 16384  # the server makes a thousand tokens and more in the time of a few requests by HTTP
API_KEY = "open sesame"
RANK = 4
KEY_VARIABLE = "RLCORE_TEST_SERVER_KEY"


def wide_model(path: Path, seed: int) -> Path:
    """The kit's model with heads of size 32: vLLM's attention on the CPU does not support size 8."""
    return tiny_model(
        path,
        seed=seed,
        initializer_range=0.15,
        max_position_embeddings=MAX_MODEL_LEN,
        hidden_size=128,
        intermediate_size=256,
    )


@dataclass
class Server:
    url: str
    model: Path
    other: Path
    log: Path

    def spec(
        self, *, max_model_len: int = MAX_MODEL_LEN, model: Path | None = None, rank: int | None = None, **settings
    ) -> RolloutSpec:
        server = ServerSettings(urls=(self.url,), api_key_env=KEY_VARIABLE, **settings)
        options = VLLMSettings(mode="server", server=server, enable_lora=rank is not None)
        return RolloutSpec(ModelSettings(path=str(model or self.model)), options, max_model_len, adapter_rank=rank)

    def get(self, path: str) -> dict:
        return httpx.get(self.url + path, timeout=60).json()

    def post(self, path: str, **arguments) -> None:
        httpx.post(self.url + path, timeout=60, **arguments).raise_for_status()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server, which starts in a minute or more; its log is shown if it does not start or a test fails."""
    folder = tmp_path_factory.mktemp("server")
    model, other = wide_model(folder / "model", 0), wide_model(folder / "other", 1)
    port = unused_port()
    log = folder / "server.log"
    arguments = {
        "model": model,
        "served-model-name": "policy",
        "host": "127.0.0.1",
        "port": port,
        "api-key": API_KEY,
        "dtype": "float32",
        "max-model-len": MAX_MODEL_LEN,
        "max-num-seqs": 64,
        "kv-cache-memory-bytes": 256 << 20,
        "max-lora-rank": 8,
        "worker-extension-cls": "rlcore_vllm.server.worker.ServerWorkerExtension",
    }
    options = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    switches = [
        "--enable-lora",
        "--enable-scale-out",
        "--enforce-eager",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
    ]
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options, *switches]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        os.environ[KEY_VARIABLE] = API_KEY
        yield Server(f"http://127.0.0.1:{port}", model, other, log)
    finally:
        os.environ.pop(KEY_VARIABLE, None)
        _end(process)


def _wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the server did not start (exit code {process.poll()}):\n{log.read_text()[-8000:]}")
        time.sleep(0.5)


def _end(process: subprocess.Popen) -> None:
    """End the server's process group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            continue


@pytest.fixture(autouse=True)
def show_log(request, server):
    """Print the server's log during the test, for the report of a failure."""
    start = server.log.stat().st_size
    yield
    with server.log.open() as log:
        log.seek(start)
        print(log.read()[-8000:])


@pytest.fixture
def rollout(server):
    engine = build(server.spec())
    yield engine
    engine.close()


def weights_of(folder: Path, buckets: int = 1) -> list[WeightBucket]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = list(model.state_dict().items())[:-1]  # the head is tied
    size = -(-len(tensors) // buckets)
    return [WeightBucket(tuple(tensors[start : start + size])) for start in range(0, len(tensors), size)]


def request(index: int = 0, max_tokens: int = 20, **changes) -> GenerationRequest:
    sampling = SamplingParams(max_tokens, seed=index, ignore_eos=True)
    return GenerationRequest([*PROMPT, index], sampling, request_id=str(index), **changes)


def largest_difference(model: Path, requests, completions) -> float:
    """Largest difference of log-probs to those of transformers."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    worst = 0.0
    for asked, completion in zip(requests, completions, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*asked.prompt, *completion.tokens]])).logits[
                0, len(asked.prompt) - 1 : -1
            ]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    return worst


class TestConformance(RolloutEngineConformance):
    max_model_len = MAX_MODEL_LEN
    draws = 500  # each is an HTTP request

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, server) -> Path:
        return server.model

    @pytest.fixture(scope="class")
    @classmethod
    def other_model(cls, server) -> Path:
        return server.other

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, server):
        engine = build(server.spec(max_connections=32))  # httpx's cost of a request grows with its connections
        yield engine
        engine.close()


del RolloutEngineConformance


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["shm", "gloo", "reload", "delta"])
def test_weight_updates_by_every_method(server, tmp_path, way):
    """Several buckets divide fused layers; after each of four updates, log-probs are the new model's."""
    settings = {
        "reload": {"weights": "reload", "weights_dir": tmp_path},
        "delta": {"transport": "gloo", "delta": True},
    }.get(way, {"transport": way})
    rollout = build(server.spec(bucket_mb=1, **settings))
    requests = [request(index) for index in range(4)]
    try:
        for version, model in ((1, server.other), (2, server.model), (3, server.other), (4, server.model)):
            rollout.update_weights(iter(weights_of(model, buckets=7)), version)
            assert rollout.version == version
            completions = rollout.generate_batch(requests)
            assert largest_difference(model, requests, completions) < 1e-4
            assert {span for completion in completions for span in completion.versions} == {(version, 20)}
        if way == "delta":
            weights = weights_of(server.model, buckets=7)
            weights[0].tensors[0][1][0, 0] += 1
            rollout.update_weights(iter(weights), 5)
            stats = next(iter(rollout.engines.values())).transfer_stats
            assert stats.delta
            assert stats.sent_bytes < stats.full_bytes / 1000
    finally:
        rollout.close()


@pytest.mark.parametrize("way", ["shm", "delta", "reload"])
def test_adapters_are_updated_by_every_method(server, tmp_path, way):
    """Before the first update the model is that of the files, although an earlier run replaced its weights."""
    full = build(server.spec())
    full.update_weights(weights_of(server.other), 1)
    full.close()
    settings = {
        "reload": {"weights": "reload", "weights_dir": tmp_path / "weights"},
        "delta": {"transport": "gloo", "delta": True},
        "shm": {"transport": "shm"},
    }[way]
    rollout = build(server.spec(rank=RANK, **settings))
    requests = [request(index) for index in range(4)]
    try:
        assert rollout.takes_adapters
        assert largest_difference(server.model, requests, rollout.generate_batch(requests)) < 1e-4
        for version in (1, 2):
            adapters = random_adapters(server.model, RANK, seed=version)
            buckets = [WeightBucket(((name, tensor),)) for name, tensor in adapters.items()]
            rollout.update_weights(iter(buckets), version)
            merged_model(server.model, adapters).save_pretrained(expected := tmp_path / str(version))
            completions = rollout.generate_batch(requests)
            assert largest_difference(expected, requests, completions) < 1e-4
            assert largest_difference(server.model, requests, completions) > 1e-2, "adapters have an effect"
            assert {span for completion in completions for span in completion.versions} == {(version, 20)}
    finally:
        rollout.close()
    # the next run trains full weights on the same server
    full = build(server.spec())
    assert largest_difference(server.model, requests, full.generate_batch(requests)) < 1e-4
    full.close()


def test_adapters_that_do_not_fit_are_refused(server):
    with pytest.raises(EngineError, match="takes adapters of rank 8 at most, and the policy trains adapters of rank 9"):
        build(server.spec(rank=9))


def test_a_refused_update_pauses_the_server_until_the_next(server, rollout):
    """An unknown tensor is reported immediately, and no request is generated with a mixture."""
    rollout.update_weights(weights_of(server.model), 1)
    start = time.monotonic()
    wrong = WeightBucket((("model.layers.0.no_such.weight", torch.zeros(4)),))
    with pytest.raises(EngineError, match=r"no rollout replica is left.*no_such"):
        rollout.update_weights([*weights_of(server.other, buckets=2), wrong], 2)
    assert time.monotonic() - start < 60
    with pytest.raises(EngineError, match="no rollout replica is left"):
        _until_settled(rollout)
    assert server.get("/is_paused") == {"is_paused": True}
    rollout.update_weights(weights_of(server.other), 3)
    completions = rollout.generate_batch([request()])
    assert completions[0].versions == [(3, 20)]
    assert largest_difference(server.other, [request()], completions) < 1e-4
    rollout.update_weights(weights_of(server.model), 4)


def _until_settled(rollout: Replicas) -> None:
    """Generate when the client of the refused update has been replaced."""
    deadline = time.monotonic() + 60
    while not any("joins at the next update_weights" in reason for reason in rollout.reasons.values()):
        assert time.monotonic() < deadline, rollout.reasons
        time.sleep(0.1)
    rollout.generate_batch([request()])


def test_a_failure_of_the_trainer_during_an_update_is_raised(server, rollout):
    def stream():
        yield weights_of(server.other, buckets=2)[0]
        raise RuntimeError("NaN in the weights")

    with pytest.raises(RuntimeError, match="NaN in the weights"):
        rollout.update_weights(stream(), 1)
    with pytest.raises(EngineError, match=r"no rollout replica is left.*its update to version 1 broke off"):
        rollout.generate_batch([request()])
    rollout.update_weights(weights_of(server.model), 2)
    completions = rollout.generate_batch([request()])
    assert largest_difference(server.model, [request()], completions) < 1e-4


def test_versions_belong_to_one_run(server):
    """Weights of another run, and a mixture that a dead client left, have no version."""
    labels = WeightLabels()
    settings = server.spec().options.server
    client = partial(connect, server.url, server.spec(), settings)
    first = client(labels)
    assert first.version == 0
    first.update_weights(weights_of(server.model), 9)
    again = client(labels)
    assert again.version == 9
    server.post("/update_weight_version", json={"new_version": labels.updating})
    server.post("/pause", params={"mode": "keep"})
    broken = client(labels)
    assert broken.version == UNKNOWN
    assert server.get("/is_paused") == {"is_paused": True}
    server.post("/update_weight_version", json={"new_version": "another:3"})
    assert client(labels).version == UNKNOWN
    first.update_weights(weights_of(server.other), 10)
    stranger = client(WeightLabels())
    assert stranger.version == 0
    assert server.get("/is_paused") == {"is_paused": False}
    completions = stranger.generate_batch([request()])
    assert largest_difference(server.model, [request()], completions) < 1e-4, "the server loads its model again"
    for engine in (first, again, broken, stranger):
        engine.close()


# --- requests --------------------------------------------------------------------------------------------------------


def test_requests_are_balanced_over_two_servers(server):
    """The two servers are one server under two names."""
    urls = (server.url, server.url.replace("127.0.0.1", "localhost"))
    options = VLLMSettings(mode="server", server=ServerSettings(urls=urls, api_key_env=KEY_VARIABLE))
    engine = build(RolloutSpec(ModelSettings(path=str(server.model)), options, MAX_MODEL_LEN))
    try:
        requests = [request(index, group=index // 4) for index in range(16)]
        completions = engine.generate_batch(requests)
        assert largest_difference(server.model, requests, completions) < 1e-4
    finally:
        engine.close()


def test_abort_ends_requests_that_wait_for_a_connection(server):
    engine: RolloutEngine = build(server.spec(max_connections=2))

    async def scenario():
        running = [asyncio.create_task(engine.generate(request(index, MAX_MODEL_LEN - 100))) for index in range(4)]
        await asyncio.sleep(1)
        engine.abort()
        return await asyncio.wait_for(asyncio.gather(*running), 60)

    try:
        completions = asyncio.run(scenario())
        assert [completion.finish_reason for completion in completions] == ["abort"] * 4
        assert [bool(completion.tokens) for completion in completions] == [True, True, False, False]
        assert len(engine.generate_batch([request()])[0].tokens) == 20
    finally:
        engine.close()


def test_priorities_are_dropped_if_the_server_has_none(rollout):
    assert len(rollout.generate_batch([request(0, priority=3)])[0].tokens) == 20


def test_a_token_outside_the_vocabulary_does_not_reach_the_server(rollout):
    with pytest.raises(EngineError, match="outside the model's vocabulary of 261"):
        rollout.generate_batch([GenerationRequest([5, 261], SamplingParams(4))])


def test_a_pause_does_not_count_as_a_timeout(server):
    engine = build(server.spec(timeout_s=2))

    async def scenario():
        engine.pause()
        running = asyncio.create_task(engine.generate(request()))
        await asyncio.sleep(4)
        assert not running.done()
        engine.resume()
        return await asyncio.wait_for(running, 60)

    try:
        assert len(asyncio.run(scenario()).tokens) == 20
    finally:
        engine.close()


def test_the_engine_http_generates_on_the_server(server, tmp_path):
    """It speaks vLLM's OpenAI protocol, and needs none of this package on the server."""
    plugin = plugins.get("rlcore.rollout_engines", "http")
    options = {"urls": (f"{server.url}/v1",), "api_key_env": KEY_VARIABLE}
    spec = RolloutSpec(ModelSettings(path=str(server.model)), plugin.config_class()(**options), 512)
    engine = plugin.build(spec)
    requests = [request(index) for index in range(4)]
    try:
        completions = engine.generate_batch(requests)
        assert largest_difference(server.model, requests, completions) < 1e-4
        assert {span for completion in completions for span in completion.versions} == {(0, 20)}
        again = engine.generate_batch(requests)
        assert [completion.tokens for completion in again] == [completion.tokens for completion in completions]
        stop = replace(requests[0].sampling, ignore_eos=False, stop_token_ids=(completions[0].tokens[5],))
        (stopped,) = engine.generate_batch([replace(requests[0], sampling=stop)])
        assert stopped.finish_reason == "stop"
        assert stopped.tokens == completions[0].tokens[: len(stopped.tokens)]
    finally:
        engine.close()
    reloading = plugin.config_class()(**options, reload="vllm", weights_dir=tmp_path)
    with pytest.raises(EngineError, match="is vLLM on the CPU, whose reload leaves the old weights"):
        plugin.build(replace(spec, options=reloading))


class TestScoring(ScoringEngineConformance):
    """The engine ``http`` scores on the server, whose own tokens it compares first."""

    model = TestConformance.model

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, server):
        engine = scoring(server)
        yield engine
        engine.close()


def scoring(server, max_length=ScoringEngineConformance.max_length, top_k=MOST, tokenizer=None):
    plugin = plugins.get("rlcore.scoring_engines", "http")
    options = plugin.config_class()(urls=(f"{server.url}/v1",), api_key_env=KEY_VARIABLE)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(server.model)
    return plugin.build(ScoringSpec(options, tokenizer, max_length, top_k))


def test_the_server_bounds_what_it_scores(server):
    """One token less than its context, because it must sample one; and 20 candidates by default."""
    engine = scoring(server, MAX_MODEL_LEN - 1, 20)
    scores = engine.score_batch([ScoringRequest([7] * (MAX_MODEL_LEN - 1), start=MAX_MODEL_LEN - 3)])
    assert len(scores[0].logprobs) == 2
    engine.close()
    with pytest.raises(EngineError, match=r"accepts sequences of 16383 tokens, but .* --max-model-len 16385"):
        scoring(server, MAX_MODEL_LEN)
    with pytest.raises(EngineError, match=r"does not give the 21 likeliest tokens; start it with --max-logprobs 21"):
        scoring(server, top_k=21)


# --- users' mistakes -------------------------------------------------------------------------------------------------


def test_a_wrong_key_model_or_length_is_refused(server, tmp_path, monkeypatch):
    with pytest.raises(EngineError, match=r"serves policy, not other \(model_name\)"):
        build(server.spec(model_name="other"))
    with pytest.raises(EngineError, match=r"accepts sequences of 16384 tokens, but this run needs 20000"):
        build(server.spec(max_model_len=20000))
    narrow = tiny_model(tmp_path / "narrow")
    with pytest.raises(EngineError, match=r"serves another model than .*hidden_size 128 instead of 32"):
        build(server.spec(model=narrow))
    monkeypatch.setenv(KEY_VARIABLE, "open barley")
    with pytest.raises(EngineError, match=r"refuses access \(401: Unauthorized\); set api_key_env"):
        build(server.spec())
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(EngineError, match=f"{KEY_VARIABLE} .*holds no API key"):
        build(server.spec())
