"""Trajectories hold exactly what was sampled, under chat templates of the field and under hand-written renderers.

The templates in ``chat_templates`` behave as those of the families that they are named after; tokenizers are trained on
their own text, so that a text has several tokenisations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlcore.engines.episode import EpisodeLimits, Trajectory
from rlcore.engines.rollout import Completion
from rlcore.errors import DataError
from rlcore_agents.conversation import ChatFormat, Reply, TokenTree, Turn, format_for

TEMPLATES = Path(__file__).parent / "chat_templates"
LIMITS = EpisodeLimits(max_turns=20, max_tokens=100_000, max_model_len=100_000, timeout_s=10)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}},
    },
}


@dataclass(frozen=True)
class Family:
    """Special tokens of a family of models, and how one of its models calls ``add`` with x=1."""

    end: str
    special: tuple[str, ...]
    call: str
    start: str | None = None
    renderer: str = "template"
    template: str | None = None
    call_end: str | None = None


HERMES = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
QWEN = ("<|endoftext|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
XML = "<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
THINK = ("<think>", "</think>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>")
LLAMA_CALL = '{"name": "add", "parameters": {"x": 1}}'
MISTRAL = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
DEEPSEEK = tuple(
    f"<｜{name}｜>"
    for name in (
        "User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end", "tool▁sep",
        "tool▁outputs▁begin", "tool▁outputs▁end", "tool▁output▁begin", "tool▁output▁end",
    )
)  # fmt: skip
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"x": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>")
HARMONY_CALL = ' to=functions.add<|channel|>commentary json<|message|>{"x": 1}'
GLM = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|assistant|>", "<|observation|>", "<tool_call>",
    "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
GLM_XML = "<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
GLM_CALL = "\n<think></think>\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"

FAMILIES = {
    "qwen2.5": Family("<|im_end|>", QWEN, HERMES),
    "qwen3": Family("<|im_end|>", QWEN + THINK, HERMES),
    "llama3": Family("<|eot_id|>", LLAMA, LLAMA_CALL, "<|begin_of_text|>"),
    "mistral": Family("</s>", MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1}}]', "<s>"),
    "gemma": Family("<end_of_turn>", ("<start_of_turn>",), HERMES, "<bos>"),
    "deepseek": Family("<｜end▁of▁sentence｜>", DEEPSEEK, DEEPSEEK_CALL, "<｜begin▁of▁sentence｜>"),
    "gpt-oss": Family("<|return|>", HARMONY, HARMONY_CALL, call_end="<|call|>"),
    "qwen3-coder": Family("<|im_end|>", QWEN, XML),
    "glm": Family("<|user|>", GLM + THINK, GLM_XML, call_end="<|observation|>"),
    "smollm2": Family("<|im_end|>", ("<|im_start|>",), HERMES),
    "qwen3 by hand": Family("<|im_end|>", QWEN + THINK, HERMES, renderer="qwen3", template="qwen3"),
    "llama3 by hand": Family("<|eot_id|>", LLAMA, LLAMA_CALL, "<|begin_of_text|>", "llama-3", "llama3"),
    "glm by hand": Family(
        "<|user|>", GLM + THINK, GLM_CALL, renderer="glm-4.5", template="", call_end="<|observation|>"
    ),
}


@cache
def tokenizer_of(name: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [family.end, *([family.start] if family.start else []), *family.special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([path.read_text() for path in sorted(TEMPLATES.iterdir())], trainer)
    template = name if family.template is None else family.template
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.end,
        bos_token=family.start,
        additional_special_tokens=list(family.special),
        chat_template=(TEMPLATES / f"{template}.jinja").read_text() if template else None,
        clean_up_tokenization_spaces=False,
    )


@cache
def format_of(name: str) -> ChatFormat:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    ends = [tokenizer.convert_tokens_to_ids(end) for end in (family.end, family.call_end) if end]
    return format_for(tokenizer, family.renderer, end_tokens=ends)


def sampled(name: str, text: str, finish: str = "stop", end: str | None = None) -> Completion:
    family = FAMILIES[name]
    end = end or (family.call_end if family.call in text and family.call_end else family.end)
    tokens = tokenizer_of(name).encode(text + (end if finish == "stop" else ""), add_special_tokens=False)
    return Completion(tokens, [-1.0] * len(tokens), finish, [(0, len(tokens))])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_are_read(name: str) -> None:
    call = FAMILIES[name].call
    tree = TokenTree(format_of(name), LIMITS)
    turn = tree.prompt([{"role": "user", "content": "1+1?"}], [ADD])
    assert tokenizer_of(name).decode(turn.tokens).count('"add"') == 1  # the schema
    reply = tree.add(turn, sampled(name, call))
    assert [(each.name, each.arguments, each.error) for each in reply.tool_calls] == [("add", {"x": 1}, "")]
    assert json.loads(reply.message["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    assert not reply.message["content"]
    assert len(reply.tool_calls[0].id) == 9
    assert tokenizer_of(name).convert_tokens_to_ids(FAMILIES[name].end) in turn.stop_tokens
    assert tokenizer_of(name).convert_tokens_to_ids(FAMILIES[name].call_end or FAMILIES[name].end) in turn.stop_tokens


@pytest.mark.parametrize("name", ["glm", "qwen3-coder"])
def test_strings_need_no_quotes_where_arguments_are_xml(name: str) -> None:
    parsed = format_of(name).parse([], sampled(name, FAMILIES[name].call.replace("1", "one, 二")).tokens, [ADD])
    assert [(call.name, call.arguments) for call in parsed.calls] == [("add", {"x": "one, 二"})]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "gemma", "qwen3 by hand"])
def test_a_closing_mark_in_an_argument_does_not_end_the_call(name: str) -> None:
    tokenizer = tokenizer_of(name)
    before, after = FAMILIES[name].call.replace("1}", '"</tool_call> 二"}').split("tool_call> 二")
    pieces = [before, "tool_call> 二" + after, FAMILIES[name].end]  # so that it is text, not the special token
    tokens = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
    parsed = format_of(name).parse([], tokens, [ADD])
    assert [(call.arguments, call.error) for call in parsed.calls] == [({"x": "</tool_call> 二"}, "")]
    special = sampled(name, FAMILIES[name].call.replace("1}", '"</tool_call> 二"}')).tokens
    (call,) = format_of(name).parse([], special, [ADD]).calls
    assert call.arguments == {"x": "</tool_call> 二"} or "not valid JSON" in call.error


@pytest.mark.parametrize("name", FAMILIES)
def test_malformed_calls_are_reported_and_the_episode_goes_on(name: str) -> None:
    call = FAMILIES[name].call
    tree = TokenTree(format_of(name), LIMITS)
    question = {"role": "user", "content": "1+1?"}
    turn = tree.prompt([question], [ADD])
    broken = call.replace("1}", "1,") if "{" in call else call.partition("1")[0]
    reply = tree.add(turn, sampled(name, broken, end=FAMILIES[name].call_end))
    assert [bool(each.error) for each in reply.tool_calls] == [True]
    answered = [{"role": "tool", "tool_call_id": each.id, "content": each.error} for each in reply.tool_calls]
    following = answered if reply.message.get("tool_calls") else [{"role": "user", "content": "what?"}]
    tree.add(tree.prompt([question, reply.message, *following], [ADD]), sampled(name, "2"))
    assert tree.trajectory().metrics["malformed_calls"] == 1


REASONING = {
    "gpt-oss": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>",
}
GOES_ON = {
    # whether a question goes on after an answer, a question after a reasoned answer, and a result after a call
    "qwen2.5": (True, True, True),  # reasoning is content
    "qwen3": (True, False, True),
    "llama3": (True, True, True),
    "mistral": (False, False, True),  # the tools move to the new question
    "gemma": (True, True, True),
    "deepseek": (True, False, True),
    "gpt-oss": (False, False, True),  # an answer ends with another token in the history
    "qwen3-coder": (True, True, True),
    "glm": (True, False, True),
    "smollm2": (True, True, True),
    "qwen3 by hand": (True, False, True),
    "llama3 by hand": (True, True, True),
    "glm by hand": (True, False, True),
}
ANSWER = {"gpt-oss": "<|channel|>final<|message|>", "mistral": " ", "glm by hand": "\n<think></think>\n"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", range(3), ids=["answer", "reasoning", "call"])
def test_rows_break_where_the_history_changes_and_only_there(name: str, case: int) -> None:
    tokenizer, chat = tokenizer_of(name), format_of(name)
    texts = (
        ANSWER.get(name, "") + "It is 2.",
        REASONING.get(name, "<think>\nhm\n</think>\n\n") + "It is 2.",
        FAMILIES[name].call,
    )
    messages: list[dict[str, Any]] = [{"role": "user", "content": "1+1?"}]
    tree = TokenTree(chat, LIMITS)
    turn = tree.prompt(messages, [ADD])
    completion = sampled(name, texts[case])
    reply = tree.add(turn, completion)
    result = {"role": "tool", "tool_call_id": "".join(call.id for call in reply.tool_calls), "content": "2 ü"}
    messages = [*messages, reply.message, result if case == 2 else {"role": "user", "content": "sure?"}]
    following = tree.prompt(messages, [ADD])
    tree.add(following, sampled(name, "yes"))
    assert (following.continues is not None) == GOES_ON[name][case]
    assert tree.trajectory().metrics["branches"] == (0 if GOES_ON[name][case] else 1)
    written_otherwise = {
        ("mistral", 2),
        ("qwen3-coder", 2),
        ("glm", 2),
    }  # these templates add ids or a line break to a call
    if (name, case) not in written_otherwise:
        assert tokenizer.decode(following.tokens) == tokenizer.decode(chat.prompt(messages, [ADD]))


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_that_tools_write_stay_text(name: str) -> None:
    tokenizer, chat = tokenizer_of(name), format_of(name)
    special = {tokenizer.convert_tokens_to_ids(token): token for token in tokenizer.get_added_vocab()}
    question = {"role": "user", "content": "1+1?"}
    attack = "".join(special.values())

    def markers(content: str) -> tuple[list[int], list[int]]:
        """Return the special tokens of the observation, in a row that goes on and in one rendered from its messages."""
        tree = TokenTree(chat, LIMITS)
        turn = tree.prompt([question], [ADD])
        completion = sampled(name, FAMILIES[name].call)
        reply = tree.add(turn, completion)
        result = {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": content}
        following = tree.prompt([question, reply.message, result], [ADD])
        assert following.continues == 0
        fresh = chat.prompt([question, reply.message, result], [ADD])
        assert content in tokenizer.decode(following.tokens)
        assert content in tokenizer.decode(fresh)
        return tuple([token for token in tokens if token in special] for tokens in (following.tokens, fresh))  # type: ignore[return-value]

    assert markers(attack) == markers("harmless")


@pytest.mark.parametrize("name", ["qwen3", "qwen3 by hand", "glm"])
def test_reasoning_that_a_client_loses_is_not_a_change_of_history(name: str) -> None:
    tree = TokenTree(format_of(name), LIMITS)
    question = {"role": "user", "content": "1+1?"}
    turn = tree.prompt([question], [ADD])
    reply = tree.add(turn, sampled(name, f"<think>\nadding\n</think>\n\n{FAMILIES[name].call}"))
    assert reply.message["reasoning_content"].strip() == "adding"
    sent = {key: value for key, value in reply.message.items() if key != "reasoning_content"}
    result = {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "2"}
    following = tree.prompt([question, sent, result], [ADD])
    assert following.continues == 0
    answer = tree.add(following, sampled(name, REASONING.get(name, "<think></think>\n") + "2"))
    again = tree.prompt([question, sent, result, answer.message, {"role": "user", "content": "sure?"}], [ADD])
    assert again.continues is None  # the template removes the reasoning of an earlier question
    assert "adding" not in tokenizer_of(name).decode(again.tokens)


@pytest.mark.parametrize("name", ["qwen3", "qwen3 by hand"])
def test_images_are_refused(name: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:image/png;,"}}]
    with pytest.raises(DataError, match="has parts that are not text, which conversations cannot show the policy"):
        format_of(name).prompt([{"role": "user", "content": parts}])


TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "", " ", "  two  spaces\n", "naïve 日本語 🦀\u200d", "</tool_call>", "<think>", "<|im_end|>", "<|eot_id|>",
            "</s>", '{"a": [1, true]}', "\n\n", "a</think>b", "\u2028\u0085",
        ]
    ),
)  # fmt: skip


@st.composite
def completions(draw: st.DrawFn, name: str) -> Completion:
    """Draw what an engine may return: any tokens, or replies that a model would write, tokenised in an odd way."""
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    kind = draw(st.sampled_from(["tokens", "answer", "reasoning", "call", "broken call"]))
    end = family.end
    if kind == "tokens":
        tokens = draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=10))
    else:
        text = draw(TEXTS)
        if kind == "reasoning":
            text = f"<think>\n{text}\n</think>\n\n{draw(TEXTS)}"
        if "call" in kind:
            call = family.call if kind == "call" else family.call.replace("1}", "1,").replace('"arguments"', '"args')
            text = ("" if family.call.startswith("{") else text) + call
            end = family.call_end or end
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
        pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)])]
        tokens = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
    if draw(st.booleans()) or not tokens:
        tokens, finish = [*tokens, tokenizer.convert_tokens_to_ids(end)], "stop"
    else:
        tokens, finish = tokens[: draw(st.integers(1, len(tokens)))], "length"
    logprobs = [-0.25 * (place + 1) for place in range(len(tokens))]
    return Completion(tokens, logprobs, finish, [(7, len(tokens))])  # type: ignore[arg-type]


@dataclass
class Episode:
    """A tree, and what the policy saw and sampled."""

    tree: TokenTree
    asked: list[tuple[list[dict[str, Any]], Turn, Completion, Reply]]

    def reply(self, messages: list[dict[str, Any]], completion: Completion) -> None:
        turn = self.tree.prompt(messages, [ADD])
        self.asked.append((messages, turn, completion, self.tree.add(turn, completion)))


@st.composite
def episodes(draw: st.DrawFn, name: str) -> Episode:
    """Draw an episode: conversations that go on, are asked again, go on from an earlier turn, or are compacted."""
    episode = Episode(TokenTree(format_of(name), LIMITS), [])
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw(TEXTS)}]
    episode.reply(messages, draw(completions(name)))
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["go on", "go on", "go on", "again", "earlier", "compacted"]))
        at = draw(st.integers(0, len(episode.asked) - 1)) if kind == "earlier" else -1
        messages, _, _, reply = episode.asked[at]
        if kind == "compacted":
            messages = [{"role": "user", "content": draw(TEXTS)}]
        elif kind != "again":
            named = [call for call in reply.tool_calls if call.name]
            results = [{"role": "tool", "tool_call_id": call.id, "content": draw(TEXTS)} for call in named]
            messages = [*messages, reply.message, *(results or [{"role": "user", "content": draw(TEXTS)}])]
        episode.reply(messages, draw(completions(name)))
    return episode


def rows(trajectory: Trajectory) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield tokens and loss positions of each row."""
    for path in trajectory.rows():
        segments = [trajectory.segments[index] for index in path]
        yield (
            [token for segment in segments for token in segment.tokens],
            [segment.sampled for segment in segments for _ in segment.tokens],
        )


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_rows_are_what_was_sampled(name: str, data: st.DataObject) -> None:
    episode = data.draw(episodes(name))
    trajectory = episode.tree.trajectory()
    sampled = [segment for segment in trajectory.segments if segment.sampled]
    assert sorted(tuple(each.tokens) for each in sampled) == sorted(tuple(c.tokens) for _, _, c, _ in episode.asked)
    for segment in sampled:
        assert len(segment.tokens) == len(segment.logprobs or ()) == sum(count for _, count in segment.versions)
    written = list(rows(trajectory))
    for _, turn, completion, _ in episode.asked:
        seen = [*turn.tokens, *completion.tokens]
        start = len(turn.tokens)
        assert any(tokens[: len(seen)] == seen and all(mask[start : len(seen)]) for tokens, mask in written), (
            "no row has this turn"
        )
        if turn.continues is not None:
            _, before, earlier, _ = episode.asked[turn.continues]
            prefix = [*before.tokens, *earlier.tokens]
            assert turn.tokens[: len(prefix)] == prefix
    assert trajectory.metrics["branches"] == len(written) - 1
    assert all(segment.tokens for segment in trajectory.segments)
    whole = [(*turn.tokens, *completion.tokens) for _, turn, completion, _ in episode.asked]
    if len(set(whole)) == len(whole):  # equal replies to one prompt are two
        assert [shared for shared, _ in shares(trajectory)] == [most for _, most in shares(trajectory)]


def shares(trajectory: Trajectory) -> Iterator[tuple[int, int]]:
    """Yield how many tokens each row has in common segments with earlier rows, and how many it could have."""
    paths, written = trajectory.rows(), list(rows(trajectory))
    for place in range(1, len(paths)):
        shared, most = 0, 0
        for other in range(place):
            common = [a for a, b in zip(paths[place], paths[other]) if a == b]
            shared = max(shared, sum(len(trajectory.segments[index].tokens) for index in common))
            marked = [list(zip(*written[row])) for row in (place, other)]
            length = next((n for n, (a, b) in enumerate(zip(*marked)) if a != b), min(map(len, marked)))
            spans = [sampled_spans(trajectory, path) for path in (paths[place], paths[other])]
            while cut := [start for row in spans for start, end in row if start < length < end]:
                length = min(cut)
            most = max(most, length)
        yield shared, most


def sampled_spans(trajectory: Trajectory, path: Sequence[int]) -> list[tuple[int, int]]:
    """Return where the sampled segments of a row begin and end; rows share whole ones."""
    ends = list(accumulate(len(trajectory.segments[index].tokens) for index in path))
    return [(start, end) for start, end, index in zip([0, *ends], ends, path) if trajectory.segments[index].sampled]
