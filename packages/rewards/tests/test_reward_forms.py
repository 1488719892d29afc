"""Reward functions as users of verl and TRL have them, unchanged. They are called here, without the pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlcore.engines.reward import RewardResult, RewardSample
from rlcore_kit.worker.process import WorkerFailure
from rlcore_rewards.calling import load
from rlcore_rewards.reply import decode, encode_result

Score = Callable[[RewardSample], RewardResult]

TEXT = RewardSample(
    prompt=[{"role": "user", "content": "6 * 7?"}],
    completion="it is 42",
    ground_truth="42",
    data_source="sums",
    extra={"solution": "42", "level": 3},
    completion_tokens=(5, 6, 1),
    prompt_text="6 * 7?",
)
CHAT = RewardSample(
    prompt=[{"role": "system", "content": "add"}, {"role": "user", "content": "6 * 7?"}],
    completion="it is 42",
    extra={"solution": "42", "reward_model": {"style": "rule"}},
)


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., Score]:
    """Load ``f`` out of source code as a worker does."""

    def from_source(source: str, form: str = "auto", **kwargs: Any) -> Score:
        file = tmp_path / "functions.py"
        file.write_text(source)
        function = load({"home": str(file), "name": "f", "kwargs": kwargs, "form": form})
        return lambda sample: decode(encode_result(function(sample)))

    return from_source


def test_plain_prompts_reach_trl_functions_as_text(loaded: Callable[..., Score]) -> None:
    score = loaded(
        "def f(prompts, completions, completion_ids, solution, level, **kwargs):\n"
        "    assert (prompts, completions, completion_ids) == (['6 * 7?'], ['it is 42'], [[5, 6, 1]])\n"
        "    assert kwargs['ground_truth'] == ['42'] and kwargs['data_source'] == ['sums']\n"
        "    assert kwargs['trainer_state'] is None and kwargs['extra_info'] == [{'solution': '42', 'level': 3}]\n"
        "    return [float(right in text) for text, right in zip(completions, solution)]"
    )
    assert score(TEXT) == RewardResult(1.0)


def test_conversations_reach_trl_functions_as_messages(loaded: Callable[..., Score]) -> None:
    score = loaded(
        "def f(completions, prompts, solution, **kwargs):\n"
        "    assert prompts[0][-1] == {'role': 'user', 'content': '6 * 7?'} and len(prompts[0]) == 2\n"
        "    assert completions[0][0]['role'] == 'assistant'\n"
        "    return [float(s in c[0]['content']) for c, s in zip(completions, solution)]"
    )
    assert score(CHAT) == RewardResult(1.0)


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("def f(completions): return [len(c) for c in completions]", RewardResult(8.0)),
        ("async def f(completions, **kwargs): return [0.5]", RewardResult(0.5)),
        ("def f(completions, **kwargs): return [None]", RewardResult(0.0, applicable=False)),
        ("import numpy\ndef f(completions, **kwargs): return numpy.array([0.25])", RewardResult(0.25)),
        (
            "def f(completions, log_metric=None, log_extra=None, **kwargs):\n"
            "    log_metric('length', 8); log_extra('text', completions); return [1.0]",
            RewardResult(1.0, {"length": 8.0}),
        ),
        ("class F:\n    def __call__(self, prompts, completions): return [1]\nf = F()", RewardResult(1.0)),
        ("from functools import partial\ndef g(completions, by): return [by]\nf = partial(g, by=3)", RewardResult(3.0)),
    ],
)
def test_results_of_trl_functions(loaded: Callable[..., Score], source: str, result: RewardResult) -> None:
    assert loaded(source)(TEXT) == result


def test_kwargs_reach_trl_functions_as_they_are(loaded: Callable[..., Score]) -> None:
    source = "def f(completions, scale, names): return [scale * len(names)]"
    assert loaded(source, scale=2, names=["a", "b"])(TEXT) == RewardResult(4.0)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("def f(completions, **kwargs): return 1.0", "result", r"lists of one sample and returned 1\.0, not a list of"),
        ("def f(completions, **kwargs): return [1.0, 2.0]", "result", "not a list of one"),
        ("def f(completions, **kwargs): return ['good']", "result", "not a number"),
        ("def f(completions, answer): return [1.0]", "exception", "needs 'answer', .* no such column, only solution"),
    ],
)
def test_failures_of_trl_functions(loaded: Callable[..., Score], source: str, kind: str, message: str) -> None:
    with pytest.raises(WorkerFailure, match=message) as caught:
        loaded(source)(TEXT)
    assert caught.value.kind == kind


def test_verls_functions(loaded: Callable[..., Score]) -> None:
    score = loaded(
        "async def f(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    assert extra_info == {'solution': '42', 'level': 3} and kwargs == {'scale': 2}\n"
        "    return {'score': kwargs['scale'] * (ground_truth in solution_str), 'acc': True, 'pred': '42', 'why': 'x'}",
        scale=2,
    )
    assert score(TEXT) == RewardResult(2.0, {"acc": 1.0}, "42")


def test_verls_batch_functions(loaded: Callable[..., Score]) -> None:
    score = loaded(
        "def f(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):\n"
        "    return [{'score': t in s, 'level': e['level']}\n"
        "            for s, t, e in zip(solution_strs, ground_truths, extra_infos)]"
    )
    assert score(TEXT) == RewardResult(1.0, {"level": 3.0})


@pytest.mark.parametrize(("form", "expected"), [("trl", 1.0), ("verl", 8.0), ("verl_batch", 1.0)])
def test_a_key_says_how_to_call_functions_of_any_arguments(
    loaded: Callable[..., Score], form: str, expected: float
) -> None:
    source = (
        "def f(**given):\n"
        "    if 'solution_str' in given: return len(given['solution_str'])\n"
        "    return [len(given.get('completions') or given['solution_strs'])]"
    )
    assert loaded(source, form)(TEXT) == RewardResult(expected)


def test_a_function_that_cannot_be_called_in_its_form(loaded: Callable[..., Score]) -> None:
    with pytest.raises(WorkerFailure, match=r"prompts, completions, .* with kwargs \['scale'\]: got an unexpected"):
        loaded("def f(completions): return [1]", scale=2)
    with pytest.raises(WorkerFailure, match=r"it must take keyword arguments among data_sources, .*'other'"):
        loaded("def f(solution_strs, other): return [1]")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "add"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "42"}


@pytest.mark.parametrize(
    "source",
    [
        "def f(sample): return len(sample.transcript) + sample.episode_score",
        "def f(solution_str, transcript): return len(transcript) + 0.5",
        "def f(solution_strs, transcripts): return [len(messages) + 0.5 for messages in transcripts]",
        "def f(completions, **kwargs):\n"
        "    assert [message['role'] for message in completions[0]] == ['assistant', 'tool']\n"
        "    return [4.5]",
    ],
)
def test_functions_read_the_conversation_of_an_episode(loaded: Callable[..., Score], source: str) -> None:
    episode = replace(CHAT, transcript=(*CHAT.prompt, CALL, RESULT), episode_score=0.5)
    assert loaded(source)(episode).score == 4.5
