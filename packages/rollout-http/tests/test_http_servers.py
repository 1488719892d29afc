"""Variants of the protocols, what the probe finds out, failures of servers, and mistakes of users."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.engines import GenerationRequest, ModelSettings, RolloutSpec, SamplingParams
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_http.engine import build
from rlcore_http.settings import HTTPSettings
from rlcore_kit.testing.inference_peer import OpenAIPeer, TGIPeer
from rlcore_kit.testing.peer_model import PeerModel
from rlcore_kit.testing.tiny_model import tiny_model, tiny_tokenizer

TEXT = "A prompt of ASCII"
PROMPT = tiny_tokenizer()(TEXT).input_ids
NOT_UTF_8 = tiny_tokenizer().convert_tokens_to_ids(["Ã", "Ã"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.15)


@pytest.fixture(scope="module")
def loaded(model):
    return PeerModel(model)


@pytest.fixture(params=[OpenAIPeer, TGIPeer], ids=["openai", "tgi"])
def peer(request, loaded):
    started = request.param(loaded)
    yield started
    started.stop()


@pytest.fixture
def openai(loaded):
    started = OpenAIPeer(loaded)
    yield started
    started.stop()


@pytest.fixture
def tgi(loaded):
    started = TGIPeer(loaded)
    yield started
    started.stop()


@pytest.fixture
def engine_over(model):
    engines = []

    def make(*peers, max_model_len=256, path=model, **settings):
        urls = tuple(peer if isinstance(peer, str) else peer.url for peer in peers)
        options = HTTPSettings(urls=urls, **settings)
        engines.append(build(RolloutSpec(ModelSettings(path=str(path)), options, max_model_len)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def request(max_tokens=12, prompt=PROMPT, **sampling):
    return GenerationRequest(prompt, SamplingParams(max_tokens, seed=1, ignore_eos=True, **sampling), request_id="one")


# --- protocols -------------------------------------------------------------------------------------------------------


def test_the_plugin_is_found_and_imports_neither_torch_nor_httpx():
    assert plugins.get("rlcore.rollout_engines", "http").config_class() is HTTPSettings
    code = "import sys, rlcore_http.plugin, rlcore_http.settings; print({'torch', 'httpx'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_protocol_is_recognised_and_both_give_the_same_tokens(loaded, engine_over):
    """The peers draw alike; so does one that is named with the path of OpenAI's clients."""
    openai, tgi = OpenAIPeer(loaded), TGIPeer(loaded)
    found = [engine_over(url).generate_batch([request()])[0] for url in (openai, tgi, f"{openai.url}/v1/")]
    assert found[0].tokens == found[1].tokens == found[2].tokens
    assert found[1].logprobs == pytest.approx(found[0].logprobs, abs=1e-4)
    assert {path for path, _ in tgi.asked} == {"/tokenize", "/generate", "/generate_stream"}
    assert tgi.asked[-1][1]["inputs"] == TEXT
    openai.stop()
    tgi.stop()


@pytest.mark.parametrize("ids", ["token_ids", "names"])
def test_ids_are_found_where_servers_put_them(openai, engine_over, ids):
    openai.ids = ids
    (completion,) = engine_over(openai).generate_batch([request()])
    assert len(completion.tokens) == len(completion.logprobs) == 12
    (without,) = engine_over(openai, logprobs=False).generate_batch([request()])
    assert (without.tokens, without.logprobs) == (completion.tokens, [])


def test_a_server_without_ids_is_refused(openai, engine_over):
    openai.ids = "none"
    with pytest.raises(EngineError, match="returns no ids of sampled tokens, and text is never tokenised again"):
        engine_over(openai)


def test_a_server_that_leaves_out_end_tokens_is_refused(openai, engine_over):
    """At a high temperature one of these completions meets the end token."""
    engine = engine_over(openai)
    requests = [replace(request(100, temperature=1.5), request_id=str(index)) for index in range(8)]
    requests = [
        replace(one, sampling=replace(one.sampling, seed=index, ignore_eos=False)) for index, one in enumerate(requests)
    ]
    ended = next(made for made in engine.generate_batch(requests) if made.finish_reason == "stop")
    assert ended.tokens[-1] == 1
    openai.hides_ends = True
    with pytest.raises(EngineError, match="did not return the token that ends it, so its ids are not all"):
        engine.generate_batch(requests)


def test_headers_key_and_further_fields_are_sent(loaded, engine_over, monkeypatch):
    peer = OpenAIPeer(loaded, api_key="sesame")
    monkeypatch.setenv("RLCORE_TEST_KEY", "sesame")
    engine = engine_over(
        peer, api_key_env="RLCORE_TEST_KEY", headers={"X-Team": "a"}, request_fields={"stream_interval": 4}
    )
    engine.generate_batch([request()])
    assert peer.headers_seen["x-team"] == "a"
    assert peer.asked[-1][1]["stream_interval"] == 4
    monkeypatch.setenv("RLCORE_TEST_KEY", "barley")
    with pytest.raises(EngineError, match=r"refuses access \(401: Unauthorized\); set api_key_env"):
        engine_over(peer, api_key_env="RLCORE_TEST_KEY")
    peer.stop()


def test_prompts_without_a_text_are_refused_by_text_generation_inference(tgi, engine_over):
    engine = engine_over(tgi)
    with pytest.raises(EngineError, match=r"request 'one' has no text of which the tokenizer makes it \(token 0 is"):
        engine.generate_batch([request(prompt=NOT_UTF_8)])
    assert len(engine.generate_batch([request()])[0].tokens) == 12


def test_another_tokenizer_on_the_server_is_noticed(tmp_path, model, engine_over):
    """Of the same size, with two tokens exchanged."""
    other = tiny_model(tmp_path / "other", initializer_range=0.15)
    file = other / "tokenizer.json"
    text = file.read_text()
    first, second = '"a": ', '"b": '
    numbers = [text.partition(name)[2].partition(",")[0] for name in (first, second)]
    text = text.replace(f"{first}{numbers[0]},", f"{first}X,").replace(
        f"{second}{numbers[1]},", f"{second}{numbers[0]},"
    )
    file.write_text(text.replace(f"{first}X,", f"{first}{numbers[1]},"))
    peer = TGIPeer(other)
    with pytest.raises(EngineError, match=r"reads the prompt of request 'probe' as other tokens: token \d+ is \d+"):
        engine_over(peer)
    peer.stop()


# --- what the probe finds out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logprobs", "sampling", "message"),
    [
        ("raw", {"temperature": 0.7}, "returns log-probs of temperature 1, not of the sampling temperature 0.7"),
        ("filtered", {"top_k": 5}, "returns log-probs after top-k, top-p and min-p"),
        ("filtered", {"top_p": 0.9}, "returns log-probs after top-k, top-p and min-p"),
        ("raw", {"top_k": 5}, ""),
        ("filtered", {"temperature": 0.7}, ""),
        ("scaled", {"temperature": 0.7, "top_k": 5}, ""),
    ],
)
def test_the_meaning_of_log_probs_is_measured(openai, engine_over, logprobs, sampling, message):
    openai.logprobs = logprobs
    engine = engine_over(openai)
    if message:
        with pytest.raises(EngineError, match=f"{message}.*; set rollout.http.logprobs=false"):
            engine.generate_batch([request(**sampling)])
    else:
        engine.generate_batch([request(**sampling)])
    assert engine.generate_batch([request(logprobs=False, **sampling)])[0].logprobs == []


@pytest.mark.parametrize(("field", "sampling"), [("top_k", {"top_k": 5}), ("min_p", {"min_p": 0.1})])
def test_filters_that_a_server_ignores_are_refused(openai, engine_over, field, sampling):
    openai.ignored = frozenset({field})
    engine = engine_over(openai)
    with pytest.raises(EngineError, match=f"does not sample with {field}; set rollout.{field} to 0"):
        engine.generate_batch([request(**sampling)])


def test_text_generation_inference_has_no_min_p(tgi, engine_over):
    with pytest.raises(EngineError, match="does not sample with min_p"):
        engine_over(tgi).generate_batch([request(min_p=0.1)])


def test_generation_settings_of_the_model_do_not_apply(openai, engine_over):
    openai.defaults = {"top_k": 1, "min_p": 1.0, "temperature": 0.1, "top_p": 0.1, "repetition_penalty": 1.1}
    (completion,) = engine_over(openai).generate_batch([request()])
    assert len(set(openai.defaults) - set(openai.asked[-1][1])) == 0
    openai.defaults = {}
    assert engine_over(openai).generate_batch([request()])[0].tokens == completion.tokens


def test_ignored_seeds_are_a_warning(openai, engine_over, caplog):
    openai.ignored = frozenset({"seed"})
    with caplog.at_level(logging.WARNING):
        engine_over(openai)
    assert "ignores seeds: completions are not reproducible" in caplog.text


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, "cut", "empty"])
def test_a_request_that_breaks_is_made_again(peer, engine_over, fault):
    """The client of the server is drained and rebuilt; the same seed gives the same completion."""
    engine = engine_over(peer)
    (undisturbed,) = engine.generate_batch([request()])
    peer.faults = [fault]
    assert engine.generate_batch([request()])[0] == undisturbed
    assert peer.faults == []


def test_a_server_that_always_fails_is_given_up(openai, engine_over):
    engine = engine_over(openai, rejoin_timeout_s=0.5)
    openai.faults = [500] * 100
    with pytest.raises(EngineError, match=r"no rollout replica is left.*failed to complete request 'one' \(500\)"):
        engine.generate_batch([request()])
    with pytest.raises(EngineError, match=r"failed to complete request 'probe' \(500\): status 500 was asked for"):
        engine_over(openai)


def test_too_many_requests_are_waited_for_as_the_server_says(peer, engine_over):
    engine = engine_over(peer)
    peer.faults, peer.retry_after_s = [429, 429], 0.3
    start = time.monotonic()
    assert len(engine.generate_batch([request()])[0].tokens) == 12
    assert time.monotonic() - start > 0.6
    peer.faults, peer.retry_after_s = [429] * 8, 0.01
    with pytest.raises(EngineError, match=r"has too many requests .* after 8 attempts: lower rollout"):
        engine.generate_batch([request()])


def test_a_refusal_is_the_servers_sentence(openai, engine_over):
    engine = engine_over(openai)
    openai.faults = [422]
    with pytest.raises(EngineError, match=r"refuses to complete request 'one' \(422\): status 422 was asked for"):
        engine.generate_batch([request()])
    assert len(engine.generate_batch([request()])[0].tokens) == 12


def test_no_answer_in_time_is_a_failure_of_the_server(loaded, engine_over):
    hanging, other = OpenAIPeer(loaded), OpenAIPeer(loaded)
    engine = engine_over(hanging, other, timeout_s=1)
    hanging.faults = other.faults = ["hang"]
    assert len(engine.generate_batch([request()])[0].tokens) == 12
    hanging.stop()
    other.stop()


def test_a_server_that_is_not_there_or_speaks_neither_protocol(engine_over, openai):
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:1 accepts no connection"):
        engine_over("http://127.0.0.1:1", retries=0)
    with pytest.raises(EngineError, match=r"refuses to report its model \(404\)"):
        engine_over(openai, protocol="tgi")


def test_requests_are_balanced_over_servers(loaded, engine_over):
    both = [OpenAIPeer(loaded, token_s=0.01), TGIPeer(loaded, token_s=0.01)]
    engine = engine_over(*both)
    engine.generate_batch([request() for _ in range(20)])
    assert all(sum("seed" in str(body) for _, body in peer.asked) > 5 for peer in both)
    for peer in both:
        peer.stop()


# --- the wrong server ------------------------------------------------------------------------------------------------


def test_another_model_or_a_short_context_is_refused(peer, engine_over, tmp_path):
    with pytest.raises(EngineError, match="accepts sequences of 512 tokens, but this run needs 1000"):
        engine_over(peer, max_model_len=1000)
    with pytest.raises(EngineError, match=r"serves .*, not other \(rollout.http.model\)"):
        engine_over(peer, model="other")
    wide = tiny_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(EngineError, match=r"serves another model than .*: hidden_size 32 instead of 64"):
        engine_over(peer, path=wide)


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_of(model):
    from safetensors.torch import load_file

    return [WeightBucket(tuple(load_file(model / "model.safetensors").items()))]


def test_servers_that_keep_their_weights_refuse_an_update(openai, engine_over, model):
    engine = engine_over(openai)
    with pytest.raises(EngineError, match=r"keep the weights that they have \(reload: none\)"):
        engine.update_weights(weights_of(model), 1)


@pytest.mark.parametrize(("reload", "remedy"), [("vllm", "VLLM_SERVER_DEV_MODE=1"), ("sglang", "is it SGLang")])
def test_a_server_without_the_endpoint_is_named(tgi, engine_over, tmp_path, reload, remedy):
    with pytest.raises(EngineError, match=f"has no endpoint for rollout.http.reload={reload}; .*{remedy}"):
        engine_over(tgi, reload=reload, weights_dir=tmp_path)


def test_vllm_on_the_cpu_cannot_reload_tied_embeddings(openai, engine_over, tmp_path):
    openai.device = "cpu"
    with pytest.raises(EngineError, match="is vLLM on the CPU, whose reload leaves the old weights"):
        engine_over(openai, reload="vllm", weights_dir=tmp_path)


def test_a_server_that_failed_gets_the_last_weights_again(openai, engine_over, tmp_path, model):
    """As after a restart, when it serves the weights of its start."""
    other = tiny_model(tmp_path / "other", seed=1, initializer_range=0.15)
    engine = engine_over(openai, reload="vllm", weights_dir=tmp_path / "weights")
    (first,) = engine.generate_batch([request()])
    engine.update_weights(weights_of(other), 5)
    (updated,) = engine.generate_batch([request()])
    assert updated.tokens != first.tokens
    assert updated.versions == [(5, 12)]
    openai.model.load(model)
    openai.faults = [500]
    assert engine.generate_batch([request()])[0] == updated
    assert openai.model.loaded.startswith(str(tmp_path / "weights"))
    engine.update_weights(weights_of(model), 6)
    assert engine.generate_batch([request()])[0].tokens == first.tokens


def test_a_second_process_may_not_update_a_server(openai, engine_over, tmp_path):
    """As all ranks under torchrun would. The lock ends with its process."""
    name = openai.url.partition("://")[2].replace(".", "-").replace(":", "-")
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(1); input()"
    command = [sys.executable, "-u", "-c", hold, tmp_path / f"{name}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(EngineError, match=r"another process gives .* weights by way of .*: only one may"):
            engine_over(openai, reload="sglang", weights_dir=tmp_path)
        other.stdin.close()
    engine_over(openai, reload="sglang", weights_dir=tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-program {folder}", "reload_command cannot be started: .*no-such-program"),
        ("sh -c 'echo no GPU is free; exit 3' {folder}", r"reload_command ended with status 3: no GPU is free \("),
        ("sh -c 'sleep 30' {folder}", "reload_command did not end within 1 s"),
    ],
)
def test_a_command_that_fails(tgi, engine_over, tmp_path, command, message):
    with pytest.raises(EngineError, match=message):
        engine_over(tgi, reload="command", reload_command=command, weights_dir=tmp_path, reload_timeout_s=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls"),
        ({"urls": ["http://10.1.2.3:80"]}, "is not on this machine; set allow_remote"),
        ({"reload": "vllm"}, "reload 'vllm' needs a folder that the servers see under the same path"),
        (
            {"protocol": "tgi", "reload": "vllm", "weights_dir": "/w"},
            "loads weights only when it starts",
        ),
        ({"reload": "command", "weights_dir": "/w"}, "goes with reload 'command', and the other way round"),
        ({"reload_command": "run {folder}"}, "goes with reload 'command', and the other way round"),
        ({"reload": "command", "weights_dir": "/w", "reload_command": "run"}, r"does not name \{folder\}"),
        (
            {"reload": "command", "weights_dir": "/w", "reload_command": "run {folder} {port}"},
            r"names \{port\}; it may",
        ),
        ({"reload": "command", "weights_dir": "/w", "reload_command": "run '{folder}"}, "cannot be read: No closing"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        HTTPSettings(**{"urls": ["http://localhost:1"], **options})
