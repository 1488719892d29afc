"""A real SGLang server, started once: conformance, weight updates by every method, pauses, faults, and a restart."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlcore import plugins
from rlcore.engines import (
    Completion,
    GenerationRequest,
    ModelSettings,
    RolloutSpec,
    SamplingParams,
    ScoringRequest,
    ScoringSpec,
)
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.serving.ports import unused_port
from rlcore_kit.serving.replicas import Replicas
from rlcore_kit.serving.weight_labels import FRESH, UNKNOWN, WeightLabels
from rlcore_kit.testing.adapters import merged_model, random_adapters
from rlcore_kit.testing.rollout_engine import PROMPT, RolloutEngineConformance
from rlcore_kit.testing.scoring_engine import MOST, ScoringEngineConformance
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_sglang import engine as engine_module
from rlcore_sglang.arguments import adapter_arguments, server_arguments
from rlcore_sglang.engine import build
from rlcore_sglang.rollout import SGLangServerRollout, connect
from rlcore_sglang.settings import SGLangSettings

MAX_MODEL_LEN = 8192  # thousands of tokens are made in the time of a few requests by HTTP
RANK = 4
KEY_VARIABLE = "RLCORE_TEST_SGLANG_KEY"
ON_CPU = {
    "device": "cpu",
    "mem_fraction_static": 0.8,  # of the memory that other processes leave; max_total_tokens bounds the cache
    "max_total_tokens": 65536,
    "max_running_requests": 64,
    "env": {"PYTHONPATH": str(Path(__file__).parent / "cpu_shim"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    "args": {"grammar_backend": "none"},
}


@dataclass
class Server:
    """The server of all tests here.

    Attributes:
        engine: the one that started it.
        log: its output.
    """

    engine: Replicas
    model: Path
    other: Path
    log: Path
    _environment: pytest.MonkeyPatch = field(repr=False)

    @property
    def rollout(self) -> SGLangServerRollout:
        """The engine's only replica, which must be running."""
        engine = self.engine.engines.get("SGLang server 0")
        assert isinstance(engine, SGLangServerRollout), self.engine.reasons
        return engine

    @property
    def url(self) -> str:
        return self.rollout.url

    def spec(self, *urls: str, model: Path | None = None, max_model_len: int = MAX_MODEL_LEN, rank=None, **settings):
        """A spec for another client of the server, as if rlcore had not started it."""
        self._environment.setenv(KEY_VARIABLE, self.rollout.process.api_key)
        options = SGLangSettings(urls=urls or (self.url,), api_key_env=KEY_VARIABLE, **settings)
        return RolloutSpec(ModelSettings(path=str(model or self.model)), options, max_model_len, adapter_rank=rank)

    def post(self, path: str, **body) -> None:
        headers = {"Authorization": f"Bearer {self.rollout.process.api_key}"}
        httpx.post(self.url + path, json=body, headers=headers, timeout=60).raise_for_status()


def with_adapters(*args, **kwargs):
    """Arguments of a server for full weights and for adapters; engines start one for either."""
    return server_arguments(*args, **kwargs) | adapter_arguments(RANK, on_cpu=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sglang")
    sharp = {"initializer_range": 0.15, "max_position_embeddings": MAX_MODEL_LEN}
    model, other = (tiny_model(folder / name, seed=seed, **sharp) for seed, name in enumerate(("model", "other")))
    settings = SGLangSettings(**ON_CPU, log_dir=folder / "logs", health_interval_s=2.0)
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr(engine_module, "server_arguments", with_adapters)
        engine = build(RolloutSpec(ModelSettings(path=str(model)), settings, MAX_MODEL_LEN))
        yield Server(engine, model, other, folder / "logs/server-0.log", environment)
    engine.close()


@pytest.fixture(autouse=True)
def show_log(server):
    """Print the server's log during the test, for the report of a failure."""
    start = server.log.stat().st_size
    yield
    with server.log.open(errors="replace") as output:
        output.seek(start)
        print(output.read()[-8000:])


@pytest.fixture
def clients(server):
    """``clients(*urls, **settings)`` builds another engine over the running server, or over a proxy or router of it."""
    built = []

    def make(*urls, **options):
        if (
            len(urls) > 1
        ):  # several names of one server, which ends if two clients make it load its model together (0.5.21)
            build(server.spec()).close()
            server.post("/update_weight_version", new_version=FRESH, abort_all_requests=False)
        built.append(build(server.spec(*urls, **options)))
        return built[-1]

    yield make
    for engine in built:
        engine.close()


@cache
def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights_of(folder: Path, buckets: int = 1) -> list[WeightBucket]:
    tensors = list(loaded(folder).state_dict().items())[:-1]  # the head is tied
    size = -(-len(tensors) // buckets)
    return [WeightBucket(tuple(tensors[start : start + size])) for start in range(0, len(tensors), size)]


def request(index: int = 0, max_tokens: int = 20, **changes) -> GenerationRequest:
    sampling = SamplingParams(max_tokens, seed=index, ignore_eos=True)
    return GenerationRequest([*PROMPT, index], sampling, request_id=str(index), **changes)


@torch.no_grad()
def logprobs(model: Path, asked: GenerationRequest, completion: Completion) -> torch.Tensor:
    """Log-probs of the completion's tokens, computed by transformers."""
    sequence = torch.tensor([[*asked.prompt, *completion.tokens]])
    logits = loaded(model)(sequence).logits[0, len(asked.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]


def largest_difference(model: Path, requests, completions) -> float:
    """Largest difference of log-probs to those of transformers."""
    return max(
        float((logprobs(model, asked, made) - torch.tensor(made.logprobs)).abs().max())
        for asked, made in zip(requests, completions, strict=True)
    )


class TestConformance(RolloutEngineConformance):
    max_model_len = MAX_MODEL_LEN
    draws = 400  # each is an HTTP request

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, server):
        return server.model

    @pytest.fixture(scope="class")
    @classmethod
    def other_model(cls, server):
        return server.other

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, server):
        return server.engine


del RolloutEngineConformance


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["tensor", "distributed", "disk"])
def test_weight_updates_by_every_method(server, clients, tmp_path, way):
    """Several buckets divide fused layers; after each of four updates, log-probs are the new model's."""
    rollout = clients(weights=way, weights_dir=tmp_path)
    requests = [request(index) for index in range(4)]
    for version, model in ((1, server.other), (2, server.model), (3, server.other), (4, server.model)):
        rollout.update_weights(iter(weights_of(model, buckets=7)), version)
        assert rollout.version == version
        completions = rollout.generate_batch(requests)
        assert largest_difference(model, requests, completions) < 1e-4
        assert {span for completion in completions for span in completion.versions} == {(version, 20)}


def test_adapters_are_updated(server, clients, tmp_path):
    """Before the first update the model is that of the files, although an earlier run replaced its weights."""
    clients().update_weights(weights_of(server.other), 1)
    adapted = {"enable_lora": True, "pause_mode": "abort", "rank": RANK}
    rollout, requests = clients(**adapted), [request(index) for index in range(4)]
    assert rollout.takes_adapters
    assert largest_difference(server.model, requests, rollout.generate_batch(requests)) < 1e-4
    for version in (1, 2):
        adapters = random_adapters(server.model, RANK, seed=version)
        merged_model(server.model, adapters).save_pretrained(expected := tmp_path / str(version))
        with ThreadPoolExecutor(1) as pool:
            unfinished = pool.submit(rollout.generate_batch, [request(4, 400)])
            time.sleep(0.5)
            rollout.update_weights([WeightBucket((pair,)) for pair in adapters.items()], version)
            (interrupted,) = unfinished.result()
        assert [number for number, _ in interrupted.versions] == [version - 1, version]
        completions = rollout.generate_batch(requests)
        assert largest_difference(expected, requests, completions) < 1e-4
        assert {span for completion in completions for span in completion.versions} == {(version, 20)}
    lacking = [WeightBucket((pair,)) for pair in list(adapters.items())[:-1]]
    with pytest.raises(EngineError, match="the update lacks a matrix of base_model"):
        rollout.update_weights(lacking, 3)
    with pytest.raises(EngineError, match=f"takes adapters of rank {RANK} at most, and the policy trains adapters"):
        clients(**{**adapted, "rank": RANK + 1})
    full = clients()
    assert largest_difference(server.model, requests, full.generate_batch(requests)) < 1e-4


def test_the_engine_http_generates_on_the_server_and_reloads_it(server, tmp_path):
    """It speaks SGLang's OpenAI protocol, and needs none of this package on the server."""
    plugin = plugins.get("rlcore.rollout_engines", "http")
    server.spec()  # exports the key
    options = {"urls": (f"{server.url}/v1",), "api_key_env": KEY_VARIABLE, "reload": "sglang", "weights_dir": tmp_path}
    spec = RolloutSpec(ModelSettings(path=str(server.model)), plugin.config_class()(**options), 512)
    engine = plugin.build(spec)
    requests = [request(index) for index in range(4)]
    try:
        for version, model in ((0, server.model), (1, server.other), (2, server.model)):
            if version:
                engine.update_weights(weights_of(model, buckets=3), version)
            completions = engine.generate_batch(requests)
            assert largest_difference(model, requests, completions) < 1e-4
            assert {span for completion in completions for span in completion.versions} == {(version, 20)}
        with ThreadPoolExecutor(1) as pool:  # SGLang learns after the update began that the client closed the stream
            unfinished = pool.submit(engine.generate_batch, [request(4, 400)])
            time.sleep(0.5)
            engine.update_weights(weights_of(server.other), 3)
            (interrupted,) = unfinished.result()
        assert [version for version, _ in interrupted.versions] == [2, 3]
        engine.update_weights(weights_of(server.model), 4)
        cool = replace(requests[0].sampling, temperature=0.7, top_k=20)
        (filtered,) = engine.generate_batch([replace(requests[0], sampling=cool)])
        assert len(filtered.logprobs) == 20
    finally:
        engine.close()


class TestScoring(ScoringEngineConformance):
    """The engine ``http`` scores on the server, whose own tokens it compares first."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, server):
        return server.model

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, server):
        engine = scoring(server)
        yield engine
        engine.close()


def scoring(server, max_length=ScoringEngineConformance.max_length, top_k=MOST):
    server.spec()  # exports the key
    plugin = plugins.get("rlcore.scoring_engines", "http")
    options = plugin.config_class()(urls=(f"{server.url}/v1",), api_key_env=KEY_VARIABLE)
    return plugin.build(ScoringSpec(options, AutoTokenizer.from_pretrained(server.model), max_length, top_k))


def test_the_server_bounds_what_it_scores(server):
    """More candidates than tokens would end it, so they are refused here."""
    longest = MAX_MODEL_LEN + 1  # rlcore started it with some more than MAX_MODEL_LEN
    engine = scoring(server, longest, 200)
    scores = engine.score_batch([ScoringRequest([7] * longest, longest - 2, 200)])
    assert scores[0].top_ids.shape == (2, 200)
    engine.close()
    with pytest.raises(EngineError, match=f"accepts sequences of {longest} tokens, but .* --context-length"):
        scoring(server, longest + 1)
    with pytest.raises(EngineError, match="top_k is 1000, but there are 262 tokens"):
        scoring(server, top_k=1000)


def test_requests_fail_while_the_weights_are_dropped(server, clients):
    """On the CPU SGLang keeps its memory; the client refuses requests."""
    rollout = clients(sleep_level=2)
    rollout.update_weights(weights_of(server.other), 1)
    rollout.sleep()
    with pytest.raises(EngineError, match=r"sleep dropped the weights of .* \(sleep_level 2\); update them"):
        rollout.generate_batch([request()])
    rollout.update_weights(weights_of(server.model), 2)
    completions = rollout.generate_batch([request()])
    assert completions[0].versions == [(2, 20)]
    assert largest_difference(server.model, [request()], completions) < 1e-4


WRONG = {
    "unknown": (lambda tensors: [*tensors, ("model.no_such", torch.zeros(4))], "holds model.no_such, which the model"),
    "shape": (lambda tensors: [(tensors[0][0], torch.zeros(3, 2))], r"of shape \[3, 2\] instead of \[261, 32\]"),
    "missing": (lambda tensors: tensors[:-2], r"lacks 2 of 26 tensors: model\.layers\.1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_of_another_model_are_refused(server, clients, wrong):
    """SGLang itself would skip them, keep the old ones, or end. No request is generated with a mixture."""
    rollout = clients()
    change, message = WRONG[wrong]
    (bucket,) = weights_of(server.other)
    with pytest.raises(EngineError, match=message):
        rollout.update_weights([WeightBucket(tuple(change(list(bucket.tensors))))], 1)
    rollout.update_weights(weights_of(server.model), 2)
    assert largest_difference(server.model, [request()], rollout.generate_batch([request()])) < 1e-4


def test_a_failure_of_the_trainer_during_an_update_is_raised(server, clients):
    rollout = clients()

    def stream():
        yield weights_of(server.other, buckets=2)[0]
        raise RuntimeError("NaN in the weights")

    with pytest.raises(RuntimeError, match="NaN in the weights"):
        rollout.update_weights(stream(), 1)
    with pytest.raises(EngineError, match=r"no rollout replica is left.*its update to version 1 broke off"):
        rollout.generate_batch([request()])
    rollout.update_weights(weights_of(server.model), 2)
    assert largest_difference(server.model, [request()], rollout.generate_batch([request()])) < 1e-4


@pytest.mark.parametrize(
    ("way", "path", "fault"),
    [
        ("tensor", "/begin_weight_update", "refuse"),
        ("tensor", "/update_weights_from_tensor", "error"),
        ("tensor", "/end_weight_update", "refuse"),
        ("distributed", "/init_weights_update_group", "refuse"),
        ("distributed", "/init_weights_update_group", "error"),
        ("distributed", "/begin_weight_update", "error"),
        ("distributed", "/update_weights_from_distributed", "refuse"),
        ("distributed", "/update_weights_from_distributed", "error"),
        ("disk", "/update_weights_from_disk", "refuse"),
    ],
)
def test_a_refusal_ends_the_update_without_waiting(server, clients, proxy, tmp_path, way, path, fault):
    """No collective waits for a server that refuses, and the next update succeeds."""
    rollout = clients(proxy.url, weights=way, weights_dir=tmp_path, rejoin_timeout_s=30.0)
    proxy.faults[path] = fault
    start = time.monotonic()
    with pytest.raises(EngineError, match="not now" if fault == "refuse" else "the scheduler met an exception"):
        rollout.update_weights(weights_of(server.other, buckets=2), 1)
    assert time.monotonic() - start < 30
    proxy.faults.clear()
    rollout.wait_until_running(60)
    rollout.update_weights(weights_of(server.model), 2)
    assert largest_difference(server.model, [request()], rollout.generate_batch([request()])) < 1e-4


def test_versions_belong_to_one_run(server):
    """Weights of another run, and a mixture that a dead client left, have no version. A run begins with the model's own
    weights."""
    spec, labels = server.spec(), WeightLabels()
    client = partial(connect, server.url, spec, spec.options)
    first = client(labels)
    assert first.version == 0
    first.update_weights(weights_of(server.other), 9)
    again = client(labels)
    assert again.version == 9
    server.post("/update_weight_version", new_version=labels.updating, abort_all_requests=False)
    broken = client(labels)
    assert broken.version == UNKNOWN
    server.post("/update_weight_version", new_version="another:3", abort_all_requests=False)
    assert client(labels).version == UNKNOWN
    stranger = client(WeightLabels())
    assert stranger.version == 0
    made = stranger.generate_batch([request()])
    assert made[0].versions == [(0, 20)]
    assert largest_difference(server.model, [request()], made) < 1e-4
    for engine in (first, again, broken, stranger):
        engine.close()
    server.engine.update_weights(weights_of(server.model), 1)


# --- pauses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_a_sample_has_tokens_of_several_versions(server, clients, mode):
    rollout = clients(pause_mode=mode)
    asked = request(3, max_tokens=1500)
    rollout.update_weights(weights_of(server.model), 1)

    async def scenario():
        running = asyncio.create_task(rollout.generate(asked))
        await rollout.generate(request(1, max_tokens=40))
        await asyncio.to_thread(rollout.update_weights, weights_of(server.other), 2)
        await rollout.generate(request(1, max_tokens=40))
        await asyncio.to_thread(rollout.pause)
        await asyncio.to_thread(rollout.update_weights, weights_of(server.model), 3)
        await asyncio.sleep(0.3)
        assert not running.done()
        await asyncio.to_thread(rollout.resume)
        return await asyncio.wait_for(running, 120)

    made = asyncio.run(scenario())
    assert made.finish_reason == "length"
    assert len(made.tokens) == len(made.logprobs) == 1500
    assert [version for version, _ in made.versions] == [1, 2, 3]
    first, second, _ = (count for _, count in made.versions)
    of_model, of_other = (logprobs(folder, asked, made) for folder in (server.model, server.other))
    found = torch.tensor(made.logprobs)
    assert found[:first].tolist() == pytest.approx(of_model[:first].tolist(), abs=1e-4)
    if mode != "in_place":  # whose tokens still attend to what the old weights had made of the ones before
        expected = torch.cat([of_other[first : first + second], of_model[first + second :]])
        assert found[first:].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


# --- requests --------------------------------------------------------------------------------------------------------


def test_abort_ends_requests_that_wait_for_a_connection(clients):
    engine, other = clients(max_connections=2), clients()

    async def scenario():
        running = [asyncio.create_task(engine.generate(request(index, MAX_MODEL_LEN - 100))) for index in range(4)]
        await asyncio.sleep(0.5)
        await other.generate(request(9))  # the server has begun with them
        await asyncio.to_thread(engine.abort)
        return await asyncio.wait_for(asyncio.gather(*running), 60)

    completions = asyncio.run(scenario())
    assert [completion.finish_reason for completion in completions] == ["abort"] * 4
    assert [bool(completion.tokens) for completion in completions] == [True, True, False, False]
    assert len(engine.generate_batch([request()])[0].tokens) == 20


@pytest.mark.parametrize("mode", ["retract", "abort"])
def test_abort_during_a_pause(clients, mode):
    """A running request returns its tokens immediately; one that arrived during the pause returns none."""
    engine = clients(pause_mode=mode)

    async def scenario():
        running = [asyncio.create_task(engine.generate(request(0, 5000)))]
        for _ in range(6):  # SGLang's scheduler reports every fiftieth token only
            await engine.generate(request(1))
        await asyncio.to_thread(engine.pause)
        running.append(asyncio.create_task(engine.generate(request(2))))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.abort)
        made = await asyncio.wait_for(asyncio.gather(*running), 60)
        await asyncio.to_thread(engine.resume)
        return made

    ran, came = asyncio.run(scenario())
    assert (ran.finish_reason, came.finish_reason) == ("abort", "abort")
    assert ran.tokens
    assert not came.tokens


def test_requests_are_balanced_over_two_servers(server, clients):
    """The two servers are one server under two names."""
    engine = clients(server.url, server.url.replace("127.0.0.1", "localhost"))
    requests = [request(index, group=index // 4) for index in range(16)]
    assert largest_difference(server.model, requests, engine.generate_batch(requests)) < 1e-4


def test_end_tokens_can_be_ignored_while_stop_tokens_count(clients):
    """SGLang itself ignores both or neither."""
    engine = clients()
    hot = {"temperature": 1.5, "ignore_eos": True}
    (whole,) = engine.generate_batch([GenerationRequest([9, 8, 7], SamplingParams(600, seed=2, **hot))])
    assert 1 in whole.tokens[:-1], "the fixed seed drew no end of sequence"
    stop = next(token for token in whole.tokens[whole.tokens.index(1) + 1 :] if token not in whole.tokens[:10])
    sampling = SamplingParams(600, seed=2, stop_token_ids=(stop,), **hot)
    (stopped,) = engine.generate_batch([GenerationRequest([9, 8, 7], sampling)])
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert stopped.logprobs == pytest.approx(whole.logprobs[: len(stopped.tokens)], abs=1e-4)


def test_a_pause_does_not_count_as_a_timeout(clients):
    engine = clients(timeout_s=2, health_interval_s=0.5)

    async def scenario():
        engine.pause()
        running = asyncio.create_task(engine.generate(request()))
        await asyncio.sleep(4)
        assert not running.done()
        engine.resume()
        return await asyncio.wait_for(running, 60)

    assert len(asyncio.run(scenario()).tokens) == 20


@pytest.fixture
def router(server):
    """SGLang's router in front of the server."""
    port, metrics = unused_port(), unused_port()
    key = server.rollout.process.api_key
    where = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1"]
    options = [*where, "--prometheus-port", str(metrics), "--worker-urls", server.url, "--api-key", key]
    process = subprocess.Popen([sys.executable, "-m", "sglang_router.launch_router", *options])
    try:
        deadline = time.monotonic() + 300
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
        while True:  # it is healthy before it knows its server
            with suppress(httpx.TransportError):
                headers = {"Authorization": f"Bearer {key}"}
                url = f"http://127.0.0.1:{port}/generate"
                if httpx.post(url, json=body, headers=headers, timeout=30).status_code == 200:
                    break
            assert process.poll() is None, "the router ended"
            assert time.monotonic() < deadline, "the router did not start"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_requests_go_through_sglangs_router(server, clients, router):
    """Weights and aborts go to the server directly."""
    engine = clients(router=router)
    engine.update_weights(weights_of(server.other), 5)
    requests = [request(index) for index in range(8)]
    completions = engine.generate_batch(requests)
    assert largest_difference(server.other, requests, completions) < 1e-4
    assert {span for made in completions for span in made.versions} == {(5, 20)}

    async def scenario():
        running = asyncio.create_task(engine.generate(request(9, 5000)))
        await engine.generate(request(1))
        await asyncio.to_thread(engine.abort, ["9"])
        return await asyncio.wait_for(running, 60)

    made = asyncio.run(scenario())
    assert made.finish_reason == "abort"
    assert made.tokens


# --- users' mistakes -------------------------------------------------------------------------------------------------


def test_a_wrong_key_model_or_length_is_refused(server, clients, tmp_path, monkeypatch):
    with pytest.raises(
        EngineError, match=r"accepts sequences of 8195 tokens, but this run needs 20000.*--context-length 20008"
    ):
        clients(max_model_len=20000)
    with pytest.raises(EngineError, match=r"serves another model than .*hidden_size 32 instead of 64"):
        clients(model=tiny_model(tmp_path / "wide", hidden_size=64))
    spec = server.spec()
    monkeypatch.setenv(KEY_VARIABLE, "open barley")
    with pytest.raises(EngineError, match=r"refuses access \(401: Unauthorized\); set api_key_env"):
        connect(server.url, spec, spec.options, WeightLabels())
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(EngineError, match=f"{KEY_VARIABLE} .*holds no API key"):
        connect(server.url, spec, spec.options, WeightLabels())


# --- faults ----------------------------------------------------------------------------------------------------------

FAULTS = {
    "error": r"failed to complete request '0' \(500\): the scheduler met an exception",
    "reset": r"closed the connection before it could complete request '0'",
    "half": r"closed the connection before it could complete request '0'",
    "hang": r"did not complete request '0' within 2 s \(timeout_s\)",
    "garbage": r"did not answer in JSON when asked to complete request '0': '<html>gateway</html>'",
    "strange": r"sent an answer that is not in the format of /generate",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_clear_message(clients, proxy, fault):
    engine = clients(proxy.url, timeout_s=2.0, rejoin_timeout_s=1.0)
    proxy.faults["/generate"] = fault
    with pytest.raises(EngineError, match=f"{proxy.url}.*{FAULTS[fault]}"):
        engine.generate_batch([request()])


@pytest.mark.parametrize("fault", FAULTS)
def test_another_server_takes_over_unfinished_requests(server, clients, proxy, fault):
    """Requests that were finished before the fault are sent once."""
    requests = [request(index) for index in range(16)]
    engine = clients(proxy.url, server.url, timeout_s=4.0)
    undisturbed = [made.tokens for made in server.engine.generate_batch(requests)]
    proxy.good, proxy.faults = 3, {"/generate": fault}
    completions = engine.generate_batch(requests)
    assert [made.tokens for made in completions] == undisturbed
    asked = [body["input_ids"][-1] for path, body in proxy.asked if path == "/generate"]
    assert 3 < len(set(asked)) == len(asked) <= 8  # some may be unsent when the first one fails


def test_a_refused_request_does_not_drain_the_server(clients, proxy):
    engine = clients(proxy.url)
    proxy.faults["/generate"] = "refuse"
    with pytest.raises(EngineError, match=r"refuses to complete request '0' \(400\): not now"):
        engine.generate_batch([request()])
    proxy.faults.clear()
    assert len(engine.generate_batch([request()])[0].tokens) == 20


def test_a_hanging_server_is_found_by_its_health_check(clients, proxy):
    """The timeout of completions is ten minutes, but the server does not report its health."""
    engine = clients(proxy.url, health_interval_s=0.5, rejoin_timeout_s=1.0)
    proxy.faults |= {"/generate": "hang", "/health": "error"}
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"hangs: .*failed to report its health"):
        engine.generate_batch([request()])
    assert time.monotonic() - start < 60


def test_an_unreachable_server_is_an_error(server, clients):
    with pytest.raises(EngineError, match=r"1 of 2 rollout replicas did not start: .*127\.0\.0\.1:9 accepts no"):
        clients(server.url, "http://127.0.0.1:9", connect_timeout_s=2.0, retries=0)


# --- servers that are started here -----------------------------------------------------------------------------------


def test_unknown_arguments_of_the_installed_version_are_refused(server, tmp_path):
    settings = SGLangSettings(**{**ON_CPU, "args": {"grammar_backnd": "none"}}, log_dir=tmp_path)
    with pytest.raises(EngineError, match=r"^rollout\.sglang\.args: .* grammar_backnd; did you mean grammar_backend"):
        build(RolloutSpec(ModelSettings(path=str(server.model)), settings, MAX_MODEL_LEN))


def test_the_key_is_hidden_from_other_users(server):
    process = server.rollout.process
    arguments = server.log.with_suffix(".json")
    assert process.api_key in arguments.read_text()
    assert [file.stat().st_mode & 0o077 for file in (arguments, server.log)] == [0, 0]
    assert process.api_key not in " ".join(psutil.Process(process.pid).cmdline())


@pytest.mark.slow
def test_tensor_parallelism_of_two_processes(server, tmp_path):
    settings = SGLangSettings(**ON_CPU, tp_size=2, log_dir=tmp_path)
    engine = build(RolloutSpec(ModelSettings(path=str(server.model)), settings, MAX_MODEL_LEN))
    try:
        requests = [request(index, max_tokens=8) for index in range(3)]
        for version, model in ((0, server.model), (1, server.other), (2, server.model)):
            if version:
                engine.update_weights(weights_of(model, buckets=3), version)
            completions = engine.generate_batch(requests)
            assert largest_difference(model, requests, completions) < 1e-4
            assert {span for made in completions for span in made.versions} == {(version, 8)}
    finally:
        engine.close()


def test_the_server_ends_with_the_process_that_started_it(server, tmp_path):
    """Its standard input closes; tested on the thread that waits for that in the server."""
    code = "from rlcore_sglang import serve; serve._end_with_starter()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.stdin.close()
    assert process.wait(60) == -signal.SIGKILL


def test_a_killed_server_is_restarted_with_the_current_weights(server):
    """Its scheduler is killed during generation: the next one has the same weights and gets the same seeds."""
    engine, killed = server.engine, server.rollout
    engine.update_weights(weights_of(server.other, buckets=3), 7)
    requests = [request(index, max_tokens=400) for index in range(6)]
    undisturbed = [made.tokens for made in engine.generate_batch(requests)]
    (scheduler,) = (
        process
        for process in psutil.Process(killed.process.pid).children(recursive=True)
        if "scheduler" in process.name()
    )

    async def scenario():
        done = await engine.generate(requests[0])
        running = [asyncio.create_task(engine.generate(asked)) for asked in requests[1:]]
        await engine.generate(request(9, max_tokens=5))
        scheduler.kill()
        return [done, *await asyncio.gather(*running)]

    completions = asyncio.run(scenario())
    assert server.rollout is not killed
    assert [made.tokens for made in completions] == undisturbed
    assert all(made.versions == [(7, 400)] for made in completions)
    assert largest_difference(server.other, requests, completions) < 1e-4
    assert engine.version == 7
    assert not psutil.pid_exists(killed.process.pid)
    engine.close()
    assert not [process for process in psutil.Process().children(recursive=True) if "sglang" in process.name()]
