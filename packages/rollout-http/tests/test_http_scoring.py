"""The scoring engine ``http``: its contract over a peer of vLLM, failures of servers, and mistakes of users."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.engines import ScoringRequest, ScoringSpec
from rlcore.errors import EngineError
from rlcore_http.scoring.engine import build
from rlcore_http.scoring.settings import HTTPScoringSettings
from rlcore_kit.serving.connection import KEEP_ALIVE_S
from rlcore_kit.testing.inference_peer import OpenAIPeer, TGIPeer
from rlcore_kit.testing.peer_model import PeerModel
from rlcore_kit.testing.scoring_engine import MOST, ScoringEngineConformance
from rlcore_kit.testing.tiny_model import tiny_model, tiny_tokenizer

TOKENS = tiny_tokenizer()("A text whose tokens are scored").input_ids


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.15)


@pytest.fixture(scope="module")
def loaded(model):
    return PeerModel(model)


@pytest.fixture
def peers(loaded):
    """Two peers that serve the same model."""
    started = OpenAIPeer(loaded), OpenAIPeer(loaded)
    yield started
    for peer in started:
        peer.stop()


@pytest.fixture
def engine_over(loaded):
    engines = []

    def make(*peers, max_length=64, top_k=3, tokenizer=loaded.tokenizer, **settings):
        options = HTTPScoringSettings(urls=tuple(peer.url for peer in peers), **settings)
        engines.append(build(ScoringSpec(options, tokenizer, max_length, top_k)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def score(engine, count=1):
    return engine.score_batch([ScoringRequest(TOKENS, 5, 3, str(index)) for index in range(count)])


class TestVLLM(ScoringEngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory):
        return tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.15)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, model):
        peer = OpenAIPeer(model)
        plugin = plugins.get("rlcore.scoring_engines", "http")
        options = plugin.config_class()(urls=(f"{peer.url}/v1",))
        engine = plugin.build(ScoringSpec(options, tiny_tokenizer(), cls.max_length, MOST))
        yield engine
        engine.close()
        peer.stop()


# --- failures --------------------------------------------------------------------------------------------------------


def stop(peer):
    """Stop a peer, and wait until the client has closed its kept connections, which the peer would still answer."""
    peer.stop()
    time.sleep(KEEP_ALIVE_S + 0.2)


def scored_by(peer):
    return sum(body.get("prompt_logprobs") is not None for _, body in peer.asked)


def test_requests_are_balanced_and_those_of_a_dead_server_go_to_the_other(peers, engine_over):
    engine = engine_over(*peers)
    score(engine, 12)
    assert [scored_by(peer) for peer in peers] == [7, 7]  # with the first request of each
    stop(peers[0])
    assert len(score(engine, 12)) == 12
    assert scored_by(peers[1]) >= 13


@pytest.mark.parametrize("fault", [500, 503, 429])
def test_a_failure_is_retried(peers, engine_over, fault):
    engine = engine_over(peers[0])
    peers[0].faults, peers[0].retry_after_s = [fault] * 2, 0.01
    assert len(score(engine)) == 1
    assert peers[0].faults == []


def test_a_request_at_which_every_server_fails_is_given_up(peers, engine_over):
    engine = engine_over(*peers)
    for peer in peers:
        peer.faults = [500] * 10
    with pytest.raises(
        EngineError, match=r"request '0' was given up after 3 failures: .*\(500\): status 500 was asked"
    ):
        score(engine)


def test_no_server_left_is_an_error_after_the_timeout(peers, engine_over):
    engine = engine_over(peers[0], rejoin_timeout_s=1, retries=0)
    stop(peers[0])
    with pytest.raises(EngineError, match=r"no server has scored a request for 1 s \(rejoin_timeout_s\): .* no connec"):
        score(engine)


def test_a_server_that_hangs_is_left(peers, engine_over):
    engine = engine_over(*peers, timeout_s=1)
    peers[0].faults = ["hang"]
    assert len(score(engine, 4)) == 4


def test_a_restarted_server_is_checked_again(peers, loaded, engine_over, tmp_path):
    """Its context is shorter now."""
    engine = engine_over(peers[0], rejoin_timeout_s=20, retries=0)
    port = peers[0].server_address[1]
    stop(peers[0])
    short = PeerModel(tiny_model(tmp_path / "short", max_position_embeddings=32))
    restarted = threading.Timer(1.0, lambda: started.append(OpenAIPeer(short, port=port)))
    started = []
    restarted.start()
    with pytest.raises(EngineError, match="accepts sequences of 31 tokens, but this run needs 64"):
        score(engine)
    started[0].stop()


# --- mistakes of users -----------------------------------------------------------------------------------------------


def test_an_unreachable_server(peers, engine_over):
    dead = SimpleNamespace(url="http://127.0.0.1:9")
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9 accepts no connection"):
        engine_over(peers[0], dead, retries=0)


def test_a_server_of_another_kind(loaded, engine_over):
    peer = TGIPeer(loaded)
    with pytest.raises(EngineError, match=r"is neither vLLM \(/version\) nor SGLang \(/server_info\)"):
        engine_over(peer)
    peer.stop()


def test_a_wrong_key_or_model(loaded, engine_over, monkeypatch):
    peer = OpenAIPeer(loaded, api_key="sesame")
    monkeypatch.setenv("RLCORE_TEST_KEY", "barley")
    with pytest.raises(EngineError, match=r"refuses access .*; set api_key_env"):
        engine_over(peer, api_key_env="RLCORE_TEST_KEY")
    monkeypatch.setenv("RLCORE_TEST_KEY", "sesame")
    with pytest.raises(EngineError, match=r"serves peer, not other \(model\)"):
        engine_over(peer, api_key_env="RLCORE_TEST_KEY", model="other")
    assert len(score(engine_over(peer, api_key_env="RLCORE_TEST_KEY", model="peer"))) == 1
    peer.stop()


def test_too_short_a_context_and_too_few_candidates(peers, engine_over):
    longest = peers[0].model.config.max_position_embeddings - 1
    with pytest.raises(
        EngineError, match=f"accepts sequences of {longest} tokens, but .* --max-model-len {longest + 2}"
    ):
        engine_over(peers[0], max_length=longest + 1)
    with pytest.raises(
        EngineError, match=r"does not give the 21 likeliest tokens; .* --max-logprobs 21, or lower top_k"
    ):
        engine_over(peers[0], top_k=21)
    with pytest.raises(EngineError, match="top_k is 300, but there are 262 tokens"):
        engine_over(peers[0], top_k=300)


def test_another_tokenizer_is_named_by_its_first_token(peers, engine_over, tmp_path):
    other = tiny_model(tmp_path / "other")
    file = other / "tokenizer.json"
    text = file.read_text()
    number = text.partition('"a": ')[2].partition(",")[0]
    file.write_text(text.replace(f'"a": {number},', '"a": 0,', 1).replace('"b": ', f'"b_": {number}, "b": ', 1))
    from transformers import AutoTokenizer

    with pytest.raises(EngineError, match=f"has another tokenizer: token {number} is 'a' there and '.*' here"):
        engine_over(peers[0], tokenizer=AutoTokenizer.from_pretrained(other))


def test_numbers_that_are_no_log_probs(peers, engine_over):
    """As vLLM returns with ``--logprobs-mode raw_logits``."""
    peers[0].score_shift = 12.0
    with pytest.raises(EngineError, match=r"numbers that are no log-probs .*raw_logprobs"):
        engine_over(peers[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls"),
        ({"urls": ["http://10.1.2.3:80"]}, "is not on this machine; set allow_remote"),
        ({"protocol": "sglang", "model": "a"}, "an SGLang server has one model"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        HTTPScoringSettings(**{"urls": ["http://localhost:1"], **options})


def test_ids_without_a_token_are_refused(peers, engine_over, loaded):
    """Among the likeliest tokens of a padded vocabulary."""

    class Shorter:
        def __len__(self):
            return 200

        def decode(self, tokens, **options):
            return loaded.tokenizer.decode(tokens, **options)

    with pytest.raises(EngineError, match=r"names \d+ as one of the likeliest tokens, .*'s 200 is: .*; lower top_k"):
        engine_over(peers[0], tokenizer=Shorter(), top_k=20)
