"""Environments with gymnasium's interface."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from rlcore import plugins
from rlcore.engines import ModelSettings, RolloutEngine, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec, PromptSample, Trajectory
from rlcore.errors import ConfigError
from rlcore_agents.gymnasium.settings import GymnasiumSettings

SYSTEM = {"role": "system", "content": "Count."}
SAMPLE = PromptSample([5], [SYSTEM, {"role": "user", "content": "-"}], extra={"seed": 4, "step": 2}, position=9)
LIMITS = EpisodeLimits(max_turns=8, max_tokens=400, max_model_len=600, timeout_s=60.0)

WORLDS = """
import random

class Counter:
    '''Say the next number, three times.'''

    def __init__(self, bonus=0.0):
        self.bonus, self.closed = bonus, 0

    def reset(self, *, seed=None, options=None):
        self.step_size, self.turns = options["step"], 0
        self.number = random.Random(seed).randrange(10)
        return f"at {self.number}", {}

    def step(self, action):
        self.turns += 1
        right = action == str(self.number + self.step_size)
        self.number += self.step_size
        over = self.turns == 3
        info = {"right": right, "raw": object()}
        return f"at {self.number}", self.bonus + right, over and right, over and not right, info

def broken(**kwargs):
    world = Counter()
    world.step = lambda action: ("old", 1.0, True, {})
    return world

class Numbers(Counter):
    def reset(self, seed=None):
        return [1.0, 2.0], {}

class Raises(Counter):
    def step(self, action):
        raise KeyError("door")
"""


@pytest.fixture
def play(
    tmp_path: Path, policy: Path, scripted: Callable[[Callable[[str], str]], RolloutEngine]
) -> Callable[..., Trajectory]:
    """Play an environment of `WORLDS` with a policy that answers a prompt by a function."""
    file = tmp_path / "worlds.py"
    file.write_text(WORLDS)

    def run(
        name: str, answer: Callable[[str], str] = lambda prompt: "1", seed: int = 3, **kwargs: object
    ) -> Trajectory:
        options = GymnasiumSettings(env=f"{file}:{name}", kwargs=kwargs)  # type: ignore[arg-type]
        spec = EpisodeSpec(
            ModelSettings(path=str(policy)), options, SamplingParams(max_tokens=16, logprobs=True), LIMITS
        )
        runner = plugins.get("rlcore.environments", "gymnasium").build(spec)
        try:
            return asyncio.run(runner.run(scripted(answer), SAMPLE, seed))  # type: ignore[no-any-return]
        finally:
            runner.close()

    return run


def successor(prompt: str) -> str:
    return str(int(prompt.rpartition("at ")[2].partition("<")[0]) + 2)


def test_rewards_of_turns_and_text_of_observations(play: Callable[..., Trajectory]) -> None:
    trajectory = play("Counter", successor, bonus=0.25)
    assert not trajectory.invalid
    assert [segment.reward for segment in trajectory.segments if segment.sampled] == [1.25] * 3
    first, second = trajectory.messages[0], trajectory.messages[1]
    assert first == SYSTEM
    assert second["content"] == play("Counter", seed=8).messages[1]["content"], "a group has the same task"
    assert trajectory.info["right"] is True
    assert [message["role"] for message in trajectory.messages[1:]] == ["user", "assistant"] * 3


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("broken", "returned ('old', 1.0, True, {}) (tuple), not (observation, reward, terminated, truncated, info)"),
        ("Numbers", "Numbers.reset returned the observation [1.0, 2.0] (list), not text"),
        ("Raises", "raised KeyError: 'door'"),
    ],
)
def test_environments_that_do_wrong_cost_their_episode(
    play: Callable[..., Trajectory], name: str, problem: str
) -> None:
    assert problem in play(name).invalid


def test_environments_that_cannot_be_made(play: Callable[..., Trajectory]) -> None:
    with pytest.raises(ConfigError, match=r"worlds.py has no 'Countr'; it has .*Counter"):
        play("Countr")
    with pytest.raises(ValueError, match=r"neither 'file\.py:name' nor"):
        GymnasiumSettings(env="CartPole-v1")
    assert "unexpected keyword argument 'size'" in play("Counter", size=3).invalid
