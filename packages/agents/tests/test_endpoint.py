"""Any rollout engine answers vLLM's token protocol: what clients get is exactly what the engine sampled."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from renderers import create_renderer
from renderers.client import generate

from rlcore.engines import GenerationRequest, SamplingParams
from rlcore.engines.rollout import Completion, RolloutEngine
from rlcore.errors import ConfigError, WorkerDied
from rlcore_agents.endpoint import Endpoint, Session
from rlcore_kit.testing.tiny_model import tiny_tokenizer

PROMPT = [3, 70, 71, 72, 1, 4]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def session(endpoint: Endpoint, engine: RolloutEngine) -> Iterator[Session]:
    with endpoint.session(engine, "policy", 512, name="test") as session:
        yield session


def post(session: Session, body: Any, key: str | None = None, path: str = "/inference/v1/generate") -> httpx.Response:
    headers = {"Authorization": f"Bearer {session.key}"} if key is None else {"x-api-key": key}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(session.url + path, content=content, headers=headers, timeout=30)


def error_of(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return str(error["message"])


def test_answers_hold_the_tokens_that_the_engine_samples_with_this_seed(
    session: Session, engine: RolloutEngine
) -> None:
    sampling = {"max_tokens": 12, "temperature": 0.7, "top_k": 50, "seed": 5, "logprobs": 0}
    response = post(session, {"token_ids": PROMPT, "sampling_params": sampling, "model": "policy"})
    (expected,) = engine.generate_batch(
        [GenerationRequest(PROMPT, SamplingParams(12, temperature=0.7, top_k=50, seed=5))]
    )
    (choice,) = response.json()["choices"]
    assert choice["token_ids"] == expected.tokens
    assert [entry["token_id"] for entry in choice["logprobs"]["content"]] == expected.tokens
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == pytest.approx(expected.logprobs, abs=1e-5)
    assert choice["finish_reason"] == expected.finish_reason
    assert choice["weight_versions"] == [{"version": str(engine.version), "start": 0, "end": len(expected.tokens)}]
    assert [call.completion.tokens for call in session.calls] == [expected.tokens]


def test_the_client_of_renderers_gets_tokens_logprobs_and_the_models_length(session: Session) -> None:
    async def ask() -> dict[str, Any]:
        async with openai.AsyncOpenAI(base_url=f"{session.url}/v1", api_key=session.key) as client:
            return await generate(
                client=client,
                renderer=create_renderer(tiny_tokenizer()),
                messages=[{"role": "user", "content": "hello"}],
                model="policy",
                sampling_params={"max_tokens": 8, "temperature": 1.0, "seed": 2},
            )

    result = asyncio.run(ask())
    (call,) = session.calls
    assert result["prompt_ids"] == list(call.request.prompt)
    assert result["completion_ids"] == call.completion.tokens
    assert result["completion_logprobs"] == pytest.approx(call.completion.logprobs)


def test_requests_of_a_seeded_session_draw_seeds_from_their_prompts_in_any_order(
    endpoint: Endpoint, engine: RolloutEngine
) -> None:
    prompts = [[3, token, 1, 4] for token in range(60, 66)] + [[3, 60, 1, 4]]

    def completions(order: list[int], seed: int) -> list[tuple[list[int], list[int]]]:
        with endpoint.session(engine, "policy", 512, seed=seed) as session, ThreadPoolExecutor(4) as pool:
            bodies = [{"token_ids": prompts[index], "sampling_params": {"max_tokens": 6}} for index in order]
            list(pool.map(lambda body: post(session, body), bodies))
            return sorted((list(call.request.prompt), call.completion.tokens) for call in session.calls)

    forward = completions([0, 1, 2, 3, 4, 5, 6], seed=1)
    assert completions([6, 5, 4, 3, 2, 1, 0], seed=1) == forward
    assert completions([0, 1, 2, 3, 4, 5, 6], seed=2) != forward
    twice = [tokens for prompt, tokens in forward if prompt == prompts[0]]
    assert twice[0] != twice[1]


def test_the_runs_sampling_overrides_that_of_requests_except_for_fewer_tokens_and_more_stops(
    endpoint: Endpoint, engine: RolloutEngine
) -> None:
    run = SamplingParams(5, temperature=0.9, top_p=0.8, stop_token_ids=(7,), logprobs=True)
    with endpoint.session(engine, "policy", 512, sampling=run, seed=1) as session:
        post(session, {"token_ids": PROMPT, "sampling_params": {"temperature": 0, "max_tokens": 9, "seed": 3}})
        post(session, {"token_ids": PROMPT, "sampling_params": {"max_tokens": 2, "stop_token_ids": [9]}})
        first, second = (call.request.sampling for call in session.calls)
    assert (first.temperature, first.top_p, first.max_tokens, first.logprobs) == (0.9, 0.8, 5, True)
    assert first.seed != 3
    assert (second.max_tokens, second.stop_token_ids) == (2, (7, 9))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body of the request is not valid JSON"),
        (b"[]", "the body of the request must be a JSON object, not list"),
        ({}, "token_ids: Field required"),
        ({"token_ids": []}, "token_ids: List should have at least 1 item"),
        ({"token_ids": [-1]}, "token_ids.0: Input should be greater than or equal to 0"),
        ({"token_ids": [10**6]}, "outside the model's vocabulary"),
        ({"token_ids": [3] * 512}, "the prompt has 512 tokens, which leaves no room for a completion"),
        ({"token_ids": [3], "stream": True}, "stream is not supported"),
        ({"token_ids": [3], "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"token_ids": [3], "sampling_params": {"logit_bias": {"3": 1}}}, "no sampling parameter logit_bias"),
    ],
)  # fmt: skip
def test_a_broken_request_is_refused_in_the_protocols_shape(session: Session, body: Any, message: str) -> None:
    response = post(session, body)
    assert response.status_code == 400
    assert message in error_of(response)
    assert session.id in error_of(response)
    assert session.refused == 1
    assert session.failure is None


def test_neutral_and_textual_parameters_are_accepted(session: Session) -> None:
    extra = {"presence_penalty": 0.0, "repetition_penalty": 1.0, "n": 1, "skip_special_tokens": False, "top_k": -1}
    assert post(session, {"token_ids": PROMPT, "sampling_params": {"max_tokens": 1, **extra}}).status_code == 200


def test_nothing_reaches_the_session_of_another_key_model_or_path(
    session: Session, endpoint: Endpoint, engine: RolloutEngine
) -> None:
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 1}}
    with endpoint.session(engine, "policy", 512, name="other") as other:
        for key in (other.key, "", "wrong"):
            response = post(session, body, key)
            assert response.status_code == 401
            assert session.id in error_of(response)
        assert post(session, {**body, "model": "gpt-5"}).status_code == 404
        assert "no POST" in error_of(post(session, body, path="/v1/embeddings"))
    endpoint.take_strays()
    response = post(other, body)
    assert response.status_code == 404
    assert f"episode {other.id} has ended" in error_of(response)
    assert endpoint.take_strays() == 1
    assert not session.calls
    assert not other.calls


class Scripted(RolloutEngine):
    """Answers by a function; requests without an answer wait for `abort`."""

    def __init__(self, answer: Any = None) -> None:
        self.answer, self.aborted = answer, []
        self.waiting = 0

    version = 0

    async def generate(self, request: GenerationRequest) -> Completion:
        if self.answer is not None:
            raise self.answer
        self.waiting += 1
        while request.request_id not in self.aborted:
            await asyncio.sleep(0.01)
        return Completion([], [], "abort")

    def abort(self, request_ids: Any = None) -> None:
        self.aborted += request_ids

    def _nothing(self, *_: object) -> None: ...

    update_weights = pause = resume = sleep = wake = _nothing  # type: ignore[assignment]


def until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_disconnects_aborts_its_request(endpoint: Endpoint) -> None:
    engine = Scripted()
    with endpoint.session(engine, "policy", 512) as session:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{session.url}/inference/v1/generate",
                json={"token_ids": PROMPT},
                headers={"x-api-key": session.key},
                timeout=0.3,
            )
        until(lambda: len(engine.aborted) == 1)


def test_the_end_of_a_session_aborts_its_requests_and_answers_them(endpoint: Endpoint) -> None:
    engine = Scripted()
    with ThreadPoolExecutor(1) as pool:
        with endpoint.session(engine, "policy", 512) as session:
            answer = pool.submit(post, session, {"token_ids": PROMPT})
            until(lambda: engine.waiting)
        assert "has ended" in error_of(answer.result(5))
    until(lambda: len(engine.aborted) == 1)


def test_the_engines_failure_is_kept_for_the_owner_of_the_session(endpoint: Endpoint) -> None:
    failure = WorkerDied("rank 3 is gone")
    with endpoint.session(Scripted(failure), "policy", 512) as session:
        response = post(session, {"token_ids": PROMPT})
    assert response.status_code == 503
    assert "rank 3 is gone" in error_of(response)
    assert session.failure is failure


def test_a_port_in_use_is_named(endpoint: Endpoint) -> None:
    port = int(endpoint.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"cannot serve on 127.0.0.1:{port}"):
        Endpoint(port=port)
