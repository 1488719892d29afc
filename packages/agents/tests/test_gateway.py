"""Agent programs reach the policy with their own clients, and the episode holds exactly what was sampled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from rlcore.engines import ModelSettings, RolloutEngine, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec, PromptSample, Trajectory
from rlcore_agents.endpoint import Endpoint
from rlcore_agents.gateway.command import CommandEnvironment
from rlcore_agents.gateway.episode_session import EpisodeSession
from rlcore_agents.gateway.gateway import gateway
from rlcore_agents.gateway.settings import CommandSettings

SAMPLING = SamplingParams(200, temperature=0.9)
LIMITS = EpisodeLimits(max_turns=6, max_tokens=1500, max_model_len=4000, timeout_s=20)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": PARAMETERS}}
Open = Callable[..., AbstractContextManager[EpisodeSession]]


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    server = gateway()
    yield server
    server.close()


@pytest.fixture(scope="module")
def episode(server: Endpoint, policy: Path) -> Open:
    """Open an episode on an engine."""

    @contextmanager
    def opened(
        engine: RolloutEngine,
        limits: EpisodeLimits = LIMITS,
        models: tuple[str, ...] = (),
        template: str | None = None,
    ) -> Iterator[Any]:
        options = CommandSettings(command="true", models=models)
        model = ModelSettings(path=str(policy))
        spec = EpisodeSpec(model, options, SAMPLING, limits, chat_template=template, end_tokens=frozenset({1}))
        environment = CommandEnvironment(spec)
        sample = PromptSample([3], [{"role": "user", "content": "2+3?"}], position=7)
        with server.serving(environment._session(engine, server, sample, seed=11)) as session:
            yield session

    return opened


def openai_client(session: EpisodeSession) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{session.url}/v1", api_key=session.key, max_retries=0)


def anthropic_client(session: EpisodeSession) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=session.url, api_key=session.key, max_retries=0)


def sampled(trajectory: Trajectory) -> list[list[int]]:
    return [list(segment.tokens) for segment in trajectory.segments if segment.sampled]


def check_one_conversation(session: EpisodeSession, engine: Any) -> None:
    """The episode is one row: the last prompt and its completion, with what the engine said about each token."""
    trajectory = session.tree.trajectory()
    assert sampled(trajectory) == [completion.tokens for _, completion in engine.made]
    (row,) = trajectory.rows()
    request, last = engine.made[-1]
    tokens = [token for index in row for token in trajectory.segments[index].tokens]
    assert tokens == [*request.prompt, *last.tokens]
    for segment, (_, completion) in zip(
        (segment for segment in trajectory.segments if segment.sampled), engine.made, strict=True
    ):
        assert segment.logprobs == completion.logprobs
        assert segment.versions == completion.versions


# --- chat completions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_a_tool_continues_its_tokens(episode: Open, scripted: Any, stream: bool) -> None:
    engine = scripted([f"I add.{CALL}", "It is 5 é."])
    with episode(engine) as session, openai_client(session) as client:
        messages: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
        first = _chat(client, stream, messages=messages)
        (call,) = first["tool_calls"]
        assert (first["content"], first["finish_reason"]) == ("I add.", "tool_calls")
        assert call["function"]["name"] == "add"
        assert json.loads(call["function"]["arguments"]) == {"a": 2, "b": 3}
        messages.append({"role": "assistant", "content": first["content"], "tool_calls": first["tool_calls"]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "5"}]})
        second = _chat(client, stream, messages=messages)
        assert (second["content"], second["finish_reason"]) == ("It is 5 é.", "stop")
        request, completion = engine.made[-1]
        assert second["usage"] == (len(request.prompt), len(completion.tokens))
        check_one_conversation(session, engine)


def _chat(client: openai.OpenAI, stream: bool, **arguments: Any) -> dict[str, Any]:
    """Return the parts of a chat completion, streamed or not."""
    arguments = {"model": "policy", "tools": [CHAT_TOOL], **arguments}
    if not stream:
        answer = client.chat.completions.create(**arguments)
        (choice,) = answer.choices
        calls = [call.model_dump() for call in choice.message.tool_calls or ()]
        numbers = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
        return {
            "content": choice.message.content, "tool_calls": calls, "finish_reason": choice.finish_reason,
            "usage": numbers,
        }  # fmt: skip
    with client.chat.completions.stream(**arguments, stream_options={"include_usage": True}) as events:
        answer = events.get_final_completion()
    (choice,) = answer.choices
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for call in choice.message.tool_calls or ()
    ]
    numbers = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    return {
        "content": choice.message.content, "tool_calls": calls, "finish_reason": choice.finish_reason, "usage": numbers
    }  # fmt: skip


def test_n_replies_share_their_prompt_and_have_logprobs(episode: Open, scripted: Any) -> None:
    engine = scripted(["one", "two", "three"])
    with episode(engine) as session, openai_client(session) as client:
        answer = client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "x"}], n=3, logprobs=True
        )
        assert [choice.message.content for choice in answer.choices] == ["one", "two", "three"]
        entries = answer.choices[0].logprobs.content
        assert [entry.token for entry in entries] == ["o", "n", "e", "<|end|>"]
        assert [entry.logprob for entry in entries] == engine.made[0][1].logprobs
        trajectory = session.tree.trajectory()
        assert len(trajectory.rows()) == 3
        assert len({request.sampling.seed for request, _ in engine.made}) == 3
        prompts = {row[0] for row in trajectory.rows()}
        assert prompts == {0}


def test_a_stop_string_is_left_out_of_the_reply_but_not_of_its_tokens(episode: Open, scripted: Any) -> None:
    engine = scripted(["Action: look\nObservation: made up", "Done."])
    with episode(engine) as session, openai_client(session) as client:
        messages: list[Any] = [{"role": "user", "content": "x"}]
        answer = client.chat.completions.create(model="policy", messages=messages, stop=["Observation:"])
        text = answer.choices[0].message.content
        assert text == "Action: look\n"
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Observation: a door"}]
        client.chat.completions.create(model="policy", messages=messages, stop="Observation:")
        assert session.tree.trajectory().metrics["branches"] == 0
        check_one_conversation(session, engine)


def test_the_runs_sampling_decides_and_requests_may_only_shorten(episode: Open, scripted: Any) -> None:
    engine = scripted(["abcdef", "abcdef"])
    with episode(engine) as session, openai_client(session) as client:
        for limit in (3, 10_000):
            client.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": "x"}], temperature=0, max_completion_tokens=limit,
                presence_penalty=0.5, response_format={"type": "json_object"}, user="me",
            )  # fmt: skip
        first, second = (request.sampling for request, _ in engine.made)
        assert (first.temperature, first.max_tokens) == (0.9, 3)
        assert second.max_tokens == SAMPLING.max_tokens
        assert session.ignored == {"temperature": 2, "presence_penalty": 2, "response_format": 2}


def test_history_that_is_changed_branches(episode: Open, scripted: Any) -> None:
    engine = scripted(["A long story.", "Fine.", "From the summary."])
    with episode(engine) as session, openai_client(session) as client:
        messages: list[Any] = [{"role": "user", "content": "x"}]
        first = _chat(client, False, messages=messages)
        messages.append({"role": "assistant", "content": first["content"]})
        _chat(client, False, messages=[*messages, {"role": "user", "content": "go on"}])
        compacted = [{"role": "user", "content": "Summary: a story."}, {"role": "user", "content": "go on"}]
        _chat(client, False, messages=compacted)
        trajectory = session.tree.trajectory()
        assert len(trajectory.rows()) == 2
        assert sampled(trajectory) == [completion.tokens for _, completion in engine.made]


# --- responses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_responses_with_a_tool_continue_their_tokens(
    episode: Open, scripted: Any, stream: bool, stateful: bool
) -> None:
    engine = scripted([f"I add.{CALL}", "It is 5."])
    tool: Any = {"type": "function", "name": "add", "description": "Add.", "parameters": PARAMETERS}

    def respond(client: openai.OpenAI, **arguments: Any) -> Any:
        arguments = {"model": "policy", "instructions": "Be brief.", "tools": [tool], **arguments}
        if not stream:
            return client.responses.create(**arguments)
        with client.responses.stream(**arguments) as events:
            return events.get_final_response()

    with episode(engine) as session, openai_client(session) as client:
        items: list[Any] = [{"role": "user", "content": "2+3?"}]
        first = respond(client, input=items)
        message, call = first.output
        assert (message.content[0].text, call.name, json.loads(call.arguments)) == ("I add.", "add", {"a": 2, "b": 3})
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        if stateful:
            second = respond(client, input=[result], previous_response_id=first.id)
        else:
            second = respond(
                client, input=[*items, *(item.model_dump(exclude_none=True) for item in first.output), result]
            )
        assert (second.output_text, second.status) == ("It is 5.", "completed")
        request, completion = engine.made[-1]
        assert (second.usage.input_tokens, second.usage.output_tokens) == (len(request.prompt), len(completion.tokens))
        check_one_conversation(session, engine)


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_messages_with_a_tool_continue_their_tokens(episode: Open, scripted: Any, stream: bool) -> None:
    engine = scripted([f"I add.{CALL}", "It is 5.\n\nHuman: more"])
    tool: Any = {"name": "add", "description": "Add.", "input_schema": PARAMETERS}

    def create(client: anthropic.Anthropic, **arguments: Any) -> Any:
        given: Any = {"model": "policy", "max_tokens": 100, "system": "Be brief.", "tools": [tool], **arguments}
        if not stream:
            return client.messages.create(**given)
        with client.messages.stream(**given) as events:
            return events.get_final_message()

    with episode(engine) as session, anthropic_client(session) as client:
        messages: list[Any] = [{"role": "user", "content": "2+3?"}]
        first = create(client, messages=messages)
        text, call = first.content
        assert (text.text, call.name, call.input, first.stop_reason) == ("I add.", "add", {"a": 2, "b": 3}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "5"}]}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        counted = client.messages.count_tokens(model="policy", system="Be brief.", tools=[tool], messages=messages)
        second = create(client, messages=messages, stop_sequences=["\n\nHuman:"])
        assert second.content[0].text == "It is 5."
        assert (second.stop_reason, second.stop_sequence) == ("stop_sequence", "\n\nHuman:")
        request, completion = engine.made[-1]
        assert counted.input_tokens == second.usage.input_tokens == len(request.prompt)
        assert second.usage.output_tokens == len(completion.tokens)
        check_one_conversation(session, engine)


def test_a_call_that_is_no_json_object_survives_the_protocol_without_such_calls(episode: Open, scripted: Any) -> None:
    engine = scripted(['<tool_call>\n{"name": "add", "arguments": {"a": }}\n</tool_call>', "Sorry."])
    tool: Any = {"name": "add", "input_schema": PARAMETERS}
    with episode(engine) as session, anthropic_client(session) as client:
        messages: list[Any] = [{"role": "user", "content": "2+3?"}]
        first = client.messages.create(model="policy", max_tokens=100, messages=messages, tools=[tool])
        call = first.content[-1]
        assert list(call.input) == ["INVALID_JSON"]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "no JSON", "is_error": True}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        client.messages.create(model="policy", max_tokens=100, messages=messages, tools=[tool])
        assert "Error: no JSON" in engine.tokenizer.decode(engine.made[-1][0].prompt)
        check_one_conversation(session, engine)


# --- reasoning --------------------------------------------------------------------------------------------------------

REASONING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_turn(session: EpisodeSession, history: list[Any]) -> tuple[str, str, Any]:
    with openai_client(session) as client:
        message = client.chat.completions.create(model="policy", messages=history).choices[0].message
    return message.reasoning_content, message.content, {"role": "assistant", "content": message.content}  # type: ignore[attr-defined]


def responses_turn(session: EpisodeSession, history: list[Any]) -> tuple[str, str, Any]:
    with openai_client(session) as client:
        reasoning, message = client.responses.create(model="policy", input=history).output
    given = [reasoning.model_dump(exclude_none=True), message.model_dump(exclude_none=True)]
    return reasoning.content[0].text, message.content[0].text, given


def messages_turn(session: EpisodeSession, history: list[Any]) -> tuple[str, str, Any]:
    with anthropic_client(session) as client, client.messages.stream(
        model="policy", max_tokens=100, messages=history
    ) as events:  # fmt: skip
        thinking, text = events.get_final_message().content
    return thinking.thinking, text.text, {"role": "assistant", "content": [thinking, text]}


@pytest.mark.parametrize("turn", [chat_turn, responses_turn, messages_turn])
def test_reasoning_is_given_and_continued_whether_the_client_returns_it_or_not(
    episode: Open, scripted: Any, turn: Callable[..., tuple[str, str, Any]]
) -> None:
    engine = scripted(["<think>2 and 3</think>It is 5.", "<think>yes</think>Sure."])
    with episode(engine, template=REASONING_TEMPLATE) as session:
        history: list[Any] = [{"role": "user", "content": "2+3?"}]
        reasoning, text, given = turn(session, history)
        assert (reasoning, text) == ("2 and 3", "It is 5.")
        history += given if isinstance(given, list) else [given]
        assert turn(session, [*history, {"role": "user", "content": "Sure?"}])[:2] == ("yes", "Sure.")
        check_one_conversation(session, engine)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_errors_have_the_protocols_form_and_the_episodes_id(episode: Open, scripted: Any, server: Endpoint) -> None:
    with episode(scripted([]), models=("gpt-4o",)) as session, episode(scripted([])) as other:
        ask: Any = {"messages": [{"role": "user", "content": "x"}]}
        with openai_client(session) as ours, anthropic_client(session) as theirs:
            with pytest.raises(openai.NotFoundError, match="the model 'gpt-9' does not exist; use 'policy'") as missing:
                ours.chat.completions.create(model="gpt-9", **ask)
            assert session.id in missing.value.message
            assert missing.value.body["type"] == "not_found_error"
            with pytest.raises(anthropic.NotFoundError, match="does not exist"):
                theirs.messages.create(model="claude", max_tokens=5, **ask)
            with pytest.raises(openai.AuthenticationError, match=f"not that of episode {session.id}"):
                ours.with_options(api_key=other.key).responses.create(model="policy", input="x")
            with pytest.raises(anthropic.AuthenticationError, match="not that of episode"):
                theirs.with_options(api_key=other.key).messages.create(model="policy", max_tokens=5, **ask)
            picture: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
            with pytest.raises(openai.BadRequestError, match="content of type 'image_url' is not supported"):
                ours.chat.completions.create(model="gpt-4o", messages=picture)
            with pytest.raises(openai.BadRequestError, match="has no field 'role'"):
                ours.chat.completions.create(model="policy", messages=[{"content": "x"}])  # type: ignore[list-item]
            with pytest.raises(anthropic.BadRequestError, match="messages: List should have at least 1 item"):
                theirs.messages.create(model="policy", max_tokens=5, messages=[])
            with pytest.raises(openai.NotFoundError, match="there is no response 'resp_1' in this episode"):
                ours.responses.create(model="policy", input="x", previous_response_id="resp_1")
            assert [model.id for model in ours.models.list()] == ["policy", "gpt-4o"]
            assert [model.id for model in theirs.models.list()] == ["policy", "gpt-4o"]
        broken = httpx.post(f"{session.url}/v1/messages", content=b"{", headers={"x-api-key": session.key}).json()
        assert broken["error"]["type"] == "invalid_request_error"
        assert session.refused == 9
        assert session.tree.turns == other.refused == 0
    server.take_strays()
    with pytest.raises(openai.NotFoundError, match=f"episode {session.id} has ended"), openai_client(session) as ours:
        ours.chat.completions.create(model="policy", **ask)
    with pytest.raises(anthropic.NotFoundError, match=f"episode {session.id} has ended"):
        anthropic_client(session).messages.create(model="policy", max_tokens=5, **ask)
    assert server.take_strays() == 2


TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": "policy",
        "messages": [
            {"role": "system", "content": "s", "name": "n"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [TOOL_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "5"},
        ],
        "tools": [CHAT_TOOL],
        "n": 1, "max_tokens": 5, "stop": ["x"], "logprobs": True, "tool_choice": {"type": "function"}, "seed": 1,
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 1.0,
    },
    "/v1/responses": {
        "model": "policy",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "5"},
        ],
        "tools": [{"type": "function", "name": "add", "parameters": PARAMETERS}],
        "text": {"format": {"type": "text"}}, "include": ["x"], "max_output_tokens": 5, "metadata": {"a": "b"},
        "instructions": "i", "previous_response_id": None,
    },
    "/v1/messages": {
        "model": "policy", "max_tokens": 5, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": ""},
                    {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "5"}]},
        ],
        "tools": [{"name": "add", "input_schema": PARAMETERS}], "tool_choice": {"type": "any"},
    },
}  # fmt: skip
ODD: list[Any] = [None, -1, {}, "\ud800"]


def mutations(value: Any) -> Iterator[Any]:
    """Yield ``value`` with each of its parts replaced by each odd value, or missing."""
    yield from ODD
    keys: Any = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        for changed in mutations(value[key]):
            copy = value.copy()
            copy[key] = changed
            yield copy
        if isinstance(value, dict):
            yield {name: part for name, part in value.items() if name != key}


@pytest.mark.parametrize("path", BODIES)
def test_whatever_a_program_sends_is_answered_or_refused(episode: Open, scripted: Any, path: str) -> None:
    engine = scripted(lambda prompt: "ok")
    headers = {"Content-Type": "application/json"}
    with episode(engine, EpisodeLimits(4000, 3000, 4000, 20)) as session, httpx.Client() as client:
        headers["x-api-key"] = session.key
        for body in (BODIES[path], *mutations(BODIES[path])):
            response = client.post(session.url + path, content=json.dumps(body), headers=headers)
            assert response.status_code in (200, 400, 404), (body, response.text)
            assert response.status_code == 200 or response.json()["error"]["message"]
        assert session.tree.turns > 40


def test_turns_and_tokens_are_bounded(episode: Open, scripted: Any) -> None:
    with episode(scripted(["a", "b"]), EpisodeLimits(2, 1500, 4000, 20)) as session, openai_client(session) as client:
        ask: Any = {"model": "policy", "messages": [{"role": "user", "content": "x"}]}
        with pytest.raises(openai.BadRequestError, match=r"used up its 2 turns \(rollout.environment.max_turns\)"):
            client.chat.completions.create(**ask, n=3)
        client.chat.completions.create(**ask, n=2)
        with pytest.raises(openai.BadRequestError, match="used up its 2 turns"):
            client.chat.completions.create(**ask)
        assert session.limited == 2
    with episode(scripted([]), EpisodeLimits(2, 1500, 30, 20)) as session, openai_client(session) as client:
        with pytest.raises(openai.BadRequestError, match="leaves no room for a reply"):
            client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "x" * 40}])
        assert session.limited == 1


def test_the_policy_itself_answers_and_its_tokens_are_recorded(episode: Open, engine: RolloutEngine) -> None:
    def ask(session: EpisodeSession) -> str:
        with openai_client(session) as client:
            answer = client.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": "x"}], max_tokens=20
            )
            return str(answer.choices[0].message.content)

    with episode(engine) as first, episode(engine) as second:
        assert ask(first) == ask(second)  # the same seed
        (call,) = first.calls
        assert sampled(first.tree.trajectory()) == [call.completion.tokens]
        assert call.completion.versions == [(engine.version, len(call.completion.tokens))]
