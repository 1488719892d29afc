"""Environments of users: what they are asked, what becomes of their answers, and what their mistakes cost."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from rlcore import plugins
from rlcore.engines import Completion, GenerationRequest, ModelSettings, SamplingParams
from rlcore.engines.episode import EpisodeSpec, Trajectory
from rlcore.errors import ConfigError
from rlcore_agents.environment.settings import PythonEnvironmentSettings
from rlcore_kit.testing.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def text(trajectory: Trajectory) -> str:
    [row] = trajectory.rows()
    return str(TOKENIZER.decode([token for index in row for token in trajectory.segments[index].tokens]))


GUESS = """
class World(Environment):
    async def reset(self, sample, seed):
        self.secret, self.turns = int(sample.ground_truth), 0
        return f"seed {seed}, level {sample.extra['level']}"

    async def step(self, reply):
        self.turns += 1
        guess = int(reply.text)
        if guess == self.secret:
            return Step(done=True, score=1.0, info={"guesses": self.turns, "said": reply.text})
        return Step("more" if guess < self.secret else "less", reward=-0.1, info={"guesses": self.turns})
"""


def guesses(prompt: str) -> str:
    return str(5 + prompt.count("more"))


def test_an_environment_answers_until_it_is_done(world: Any) -> None:
    trajectory = world.play(GUESS, guesses)
    said = "<|user|>seed 5, level 3<|end|><|assistant|>5<|end|><|user|>more<|end|><|assistant|>6<|end|>"
    assert text(trajectory) == said + "<|user|>more<|end|><|assistant|>7<|end|>"
    sampled = [segment for segment in trajectory.segments if segment.sampled]
    assert [TOKENIZER.decode(segment.tokens) for segment in sampled] == ["5<|end|>", "6<|end|>", "7<|end|>"]
    assert [segment.reward for segment in sampled] == [-0.1, -0.1, None]
    assert (trajectory.score, trajectory.invalid, trajectory.finish_reason) == (1.0, "", "stop")
    assert trajectory.info == {"guesses": 3, "said": "7"}
    assert trajectory.metrics["env/guesses"] == trajectory.metrics["turns"] == 3
    assert trajectory.metrics["truncated"] == 0
    assert trajectory.messages[-1] == {"role": "assistant", "content": "7"}


def test_plain_methods_run_in_threads(world: Any) -> None:
    trajectory = world.play(GUESS.replace("async ", ""), guesses)
    assert trajectory.score == 1.0
    assert trajectory.metrics["turns"] == 3


PLAY = """
async def World(chat, sample):
    reply = await chat()
    while reply.text != sample.ground_truth:
        chat.reward(-0.1)
        reply = await chat("more")
    chat.info["seed"] = chat.seed
    return 1
"""


@pytest.mark.parametrize("code", [PLAY, PLAY.replace("async ", "").replace("await ", "")], ids=["async", "plain"])
def test_a_function_plays_with_a_chat(world: Any, code: str) -> None:
    trajectory = world.play(code, guesses)
    assert text(trajectory).startswith("<|user|>hi<|end|><|assistant|>5<|end|><|user|>more<|end|><|assistant|>6<|end|>")
    assert [segment.reward for segment in trajectory.segments if segment.sampled] == [-0.1, -0.1, None]
    assert (trajectory.score, trajectory.invalid, trajectory.info) == (1.0, "", {"seed": 5})


def test_conversations_of_a_function_become_branches(world: Any) -> None:
    code = """
async def World(chat, sample):
    both = await asyncio.gather(chat.complete([{"role": "user", "content": "a"}]),
                                chat.complete([{"role": "user", "content": "b"}]))
    for value, reply in enumerate(both):
        chat.reward(value, reply)
"""
    trajectory = world.play(code, lambda prompt: prompt[-len("?<|end|><|assistant|>")])
    assert len(trajectory.rows()) == 2
    rewards = {TOKENIZER.decode(each.tokens): each.reward for each in trajectory.segments if each.sampled}
    assert rewards == {"a<|end|>": 0.0, "b<|end|>": 1.0}


TOOLS = """
def double(number: int) -> int:
    '''Return twice the number.'''
    return 2 * number

class World(Environment):
    tools = [double]
"""


def test_tools_are_called_between_replies(world: Any) -> None:
    """Without `step`, the episode ends with the first reply that calls no tool, and the environment gives no score."""
    call = '<tool_call>{"name": "double", "arguments": {"number": 21}}</tool_call>'
    trajectory = world.play(TOOLS, lambda prompt: "done" if "42" in prompt else call)
    assert trajectory.metrics["turns"] == 2
    assert trajectory.metrics["tool_calls"] == 1
    assert trajectory.metrics["tool_errors"] == 0
    assert trajectory.score is None
    assert [message["role"] for message in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    assert trajectory.messages[2]["content"] == "42"


def test_seeds_of_turns_differ_and_come_from_the_episode(world: Any) -> None:
    runner = world.runner(GUESS)
    seeds = []
    for seed in (5, 5, 6):
        engine = world.engine(guesses)
        world.run(runner, engine, seed)
        seeds.append([request.sampling.seed for request, _ in engine.made])
    runner.close()
    assert seeds[0] == seeds[1]
    assert seeds[0][0] == 5
    assert len({*seeds[0], *seeds[2]}) == 6


@pytest.mark.parametrize(
    ("limits", "turns"),
    [({"max_turns": 2}, 2), ({"max_tokens": 36}, 4), ({"max_model_len": 40}, 4)],
    ids=["turns", "tokens", "context"],
)
def test_a_limit_truncates_and_rewards_so_far_count(world: Any, limits: dict[str, int], turns: int) -> None:
    """The prompt has 5 tokens, the first turn 2, and each further one 9, of which 7 are the environment's."""
    world.limits = replace(world.limits, **limits)
    trajectory = world.play(GUESS.replace("return f\"seed {seed}, level {sample.extra['level']}\"", ""), lambda _: "5")
    assert trajectory.invalid == ""
    assert trajectory.finish_reason == "length"
    assert trajectory.metrics["truncated"] == 1
    assert trajectory.metrics["turns"] == turns
    assert trajectory.score == 0.0
    assert sum(segment.reward or 0.0 for segment in trajectory.segments) == pytest.approx(-0.1 * turns)


def test_a_time_limit_truncates(world: Any) -> None:
    engine = world.engine(lambda _: "5")
    generate = engine.generate

    async def slow(request: GenerationRequest) -> Completion:
        await asyncio.sleep(0.0 if len(engine.made) < 2 else 30.0)
        return await generate(request)

    engine.generate = slow
    world.limits = replace(world.limits, timeout_s=1.0)
    trajectory = world.run(world.runner(GUESS), engine)
    assert (trajectory.finish_reason, trajectory.invalid, trajectory.metrics["turns"]) == ("length", "", 2)


def test_an_environment_that_hangs_at_the_end_of_its_time_ends_with_it(world: Any) -> None:
    world.limits = replace(world.limits, timeout_s=0.5)
    hangs = "class World(Environment):\n    async def step(self, reply): await asyncio.sleep(60)"
    start = time.monotonic()
    trajectory = world.play(hangs)
    assert time.monotonic() - start < 8
    assert "the environment took longer than timeout_s=0.5 of the episode allows" in trajectory.invalid


def test_an_aborted_reply_ends_the_episode(world: Any) -> None:
    async def aborted(request: GenerationRequest) -> Completion:
        return Completion([50], [-0.5], "abort", [(0, 1)])

    engine = world.engine(str)
    engine.generate = aborted
    trajectory = world.run(world.runner(GUESS), engine)
    assert (trajectory.finish_reason, trajectory.invalid, trajectory.metrics["turns"]) == ("abort", "", 1)


def test_a_function_may_score_what_it_got(world: Any) -> None:
    code = """
async def World(chat, sample):
    try:
        while True:
            await chat("more")
    except EpisodeTruncated:
        return len(chat.messages)
"""
    trajectory = world.play(code)
    assert trajectory.finish_reason == "length"
    assert trajectory.score == 18  # the prompt's, eight turns, and the one that found no room


BROKEN = {
    "constructor": ("def __init__(self): raise ValueError('no')", "World() raised ValueError: no (", ", line "),
    "reset": ("def reset(self, sample, seed): raise ValueError('no')", "World.reset raised ValueError: no ("),
    "step": ("async def step(self, reply): return 1 / 0", "World.step raised ZeroDivisionError: division by zero ("),
    "exit": ("def step(self, reply): os.sys.exit(3)", "World.step raised ", "SystemExit: 3"),
    "close": ("async def close(self): raise OSError('busy')", "World.close raised OSError: busy ("),
    "type": ("def step(self, reply): return 1.0, True", "World.step returned (1.0, True) (tuple), not a Step"),
    "nothing": ("def step(self, reply): return Step()", "World.step returned neither an observation nor done=True"),
    "opening": ("def reset(self, sample, seed): return 3", "World.reset returned 3 (int), neither text nor a list"),
    "message": ("def reset(self, sample, seed): return [{'content': ''}]", "without a role or content"),
    "nan": (
        "def step(self, reply): return Step(done=True, reward=float('nan'))",
        "the reward that World.step returned is nan, not a finite number",
    ),
    "text": ("def step(self, reply): return Step(done=True, score='1')", "is '1' (str), not a number"),
    "early": ("def step(self, reply): return Step('x', score=1)", "returned a score without done=True"),
    "info": (
        "def step(self, reply): return Step(done=True, info={'at': object})",
        "World.step returned info that is not made of texts, finite numbers, lists and dicts",
    ),
    "long": ("def reset(self, sample, seed): return 'x' * 700", "its first prompt has 7"),
    "tool": ("tools = [len]", "tool 'len'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_mistake_costs_its_episode(world: Any, case: str) -> None:
    method, *parts = BROKEN[case]
    trajectory = world.play(f"class World(Environment):\n    {method}\n")
    for part in parts:
        assert part in trajectory.invalid
    assert "\n" not in trajectory.invalid
    assert trajectory.segments[0].tokens


def test_a_flood_is_cut(world: Any) -> None:
    code = """
class World(Environment):
    async def step(self, reply):
        return Step(done=True) if reply.text == "bye" else Step("x" * 100_000_000)
"""
    start = time.monotonic()
    trajectory = world.play(code, lambda prompt: "bye" if "xxx" in prompt else "hi", max_observation_chars=100)
    assert time.monotonic() - start < 10
    assert (trajectory.invalid, trajectory.metrics["observations_cut"]) == ("", 1)
    assert f"{'x' * 100}\n[… 99999900 more characters]" in text(trajectory)


CLOSED = """
class World(Environment):
    async def step(self, reply):
        {body}

    async def close(self):
        open({log!r}, "a").write("closed ")
"""


@pytest.mark.parametrize(
    "body", ["await asyncio.sleep(60)", "return Step(done=True)", "raise OSError"], ids=["hangs", "ends", "raises"]
)
def test_close_is_called_whatever_happens(world: Any, body: str) -> None:
    log = world.folder / "log"
    trajectory = world.play(CLOSED.format(body=body, log=str(log)), turn_timeout_s=1.0)
    assert log.read_text() == "closed "
    assert bool(trajectory.invalid) == (body != "return Step(done=True)")
    assert ("took longer than turn_timeout_s=1" in trajectory.invalid) == ("sleep" in body)


def test_close_is_called_when_the_run_is_cancelled(world: Any) -> None:
    log = world.folder / "log"
    runner = world.runner(CLOSED.format(body="await asyncio.sleep(60)", log=str(log)))

    async def cancelled() -> None:
        task = asyncio.create_task(runner.run(world.engine(lambda _: "ok"), world.sample, 5))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    end = time.monotonic() + 5
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert log.read_text() == "closed "
    runner.close()


def test_a_plain_function_that_hangs_costs_its_episode_alone(world: Any) -> None:
    code = """
class World(Environment):
    def step(self, reply):
        if reply.text == "hang":
            time.sleep(20)
        return Step(done=True, score=1.0)
"""
    runner = world.runner(code, turn_timeout_s=1.0)

    async def both() -> list[Trajectory]:
        answers = [world.engine(lambda _: "hang"), world.engine(lambda _: "ok")]
        return list(await asyncio.gather(*(runner.run(engine, world.sample, 5) for engine in answers)))

    start = time.monotonic()
    hangs, other = asyncio.run(both())
    assert time.monotonic() - start < 5
    assert "turn_timeout_s" in hangs.invalid
    assert (other.invalid, other.score) == ("", 1.0)
    runner.close()


def test_a_coroutine_that_blocks_costs_its_event_loop_alone(world: Any) -> None:
    code = """
class World(Environment):
    async def step(self, reply):
        if reply.text == "block":
            time.sleep(20)
        return Step(done=True, score=1.0)
"""
    runner = world.runner(code, turn_timeout_s=1.0)
    with pytest.warns(UserWarning, match="environment World blocks its event loop"):
        blocked = world.run(runner, world.engine(lambda _: "block"))
    assert "turn_timeout_s" in blocked.invalid
    assert world.run(runner, world.engine(lambda _: "ok"), 6).score == 1.0
    runner.close()


def test_a_failing_engine_ends_the_run_and_closes_the_environment(world: Any) -> None:
    async def broken(request: GenerationRequest) -> Completion:
        raise RuntimeError("the engine is gone")

    engine = world.engine(str)
    engine.generate = broken
    runner, before = world.runner(PLAY.replace("async ", "").replace("await ", "")), set(threading.enumerate())
    with pytest.raises(RuntimeError, match="the engine is gone"):
        world.run(runner, engine)
    runner.close()
    end = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("code", "name", "options", "message"),
    [
        ("x = 1", "World", {}, "has no 'World'"),
        ("World = 3", "World", {}, "World is 3 (int), neither a class nor a function"),
        ("class World: ...", "World", {}, "World is not a subclass of rlcore_agents.Environment"),
        ("def World(chat): ...", "World", {}, "takes a chat and a sample, but World(chat) cannot be called"),
        ("class World(Environment): ...", "World", {"kwargs": {"size": 3}}, "with kwargs ['size']"),
        ("class World(Environment):\n  def __init__(self, size): ...", "World", {}, "missing a required argument"),
        ("import nothing_there", "World", {}, "importing it fails: ModuleNotFoundError"),
        ("def", "World", {}, "importing it fails: SyntaxError"),
    ],
)
def test_mistakes_are_named_before_the_run(
    world: Any, code: str, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=r"environment .*world.py:World'") as error:
        world.runner(code, name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(world: Any) -> None:
    settings = PythonEnvironmentSettings
    with pytest.raises(ValueError, match=r"is neither 'file.py:name' nor 'package.module:name'"):
        settings(path="world.py")
    spec = EpisodeSpec(
        ModelSettings(path=str(world.policy)), settings(path="worl.py:World"), SamplingParams(8), world.limits
    )
    with pytest.raises(ConfigError, match=r"environment 'worl.py:World': file .*worl.py does not exist"):
        plugins.get("rlcore.environments", "python").build(spec)


STATES = """
class World(Environment):
    def step(self, reply):
        return Step(done=True) if reply.turn else Step("go", state=7)

def chat(chat, sample):
    chat.state = "door"
    chat("in")
    chat("out")
"""


@pytest.mark.parametrize(("name", "states"), [("World", [None, "7"]), ("chat", ["door", None])])
def test_turns_are_taken_in_states_that_environments_name(world: Any, name: str, states: list[str | None]) -> None:
    trajectory = world.play(STATES, name=name)
    assert [segment.state for segment in trajectory.segments if segment.sampled] == states
