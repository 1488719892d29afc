"""A tiny policy behind the inline rollout engine, which all files of the session share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlcore import plugins
from rlcore.engines import GenerationRequest, ModelSettings, RolloutEngine, RolloutSpec, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeRunner, EpisodeSpec, PromptSample, Trajectory
from rlcore.engines.rollout import Completion
from rlcore_agents.environment.settings import PythonEnvironmentSettings
from rlcore_kit.testing.tiny_model import tiny_model, tiny_tokenizer

MAX_MODEL_LEN = 4096


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a random model whose tokens are bytes; answers end at ``<|end|>`` (1)."""
    return tiny_model(tmp_path_factory.mktemp("policy") / "model", max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def engine(policy: Path) -> Iterator[RolloutEngine]:
    """The policy on the inline engine, with `MAX_MODEL_LEN`."""
    inline = plugins.get("rlcore.rollout_engines", "inline")
    spec = RolloutSpec(ModelSettings(path=str(policy)), inline.config_class()(), MAX_MODEL_LEN, seed=1)
    engine: RolloutEngine = inline.build(spec)
    yield engine
    engine.close()


class ScriptedEngine(RolloutEngine):
    """Answers with given texts, exactly as a model that samples them would: within ``max_tokens``, to a stop string.

    Attributes:
        replies: the next replies, or a function of the prompt's text.
        made: requests and completions in their order.
        prompts: texts of the prompts.
    """

    version = 0

    def __init__(self, replies: Sequence[str] | Callable[[str], str]) -> None:
        self.replies = list(replies) if isinstance(replies, Sequence) else replies
        self.made: list[tuple[GenerationRequest, Completion]] = []
        self.prompts: list[str] = []
        self.tokenizer = tiny_tokenizer()

    async def generate(self, request: GenerationRequest) -> Completion:
        self.prompts.append(self.tokenizer.decode(list(request.prompt)))
        reply = self.replies.pop(0) if isinstance(self.replies, list) else self.replies(self.prompts[-1])
        ends = [reply.index(stop) + len(stop) for stop in request.sampling.stop if stop in reply]
        tokens = self.tokenizer.encode(reply[: min(ends)] if ends else f"{reply}<|end|>")
        kept = tokens[: request.sampling.max_tokens]
        reason = "length" if len(kept) < len(tokens) else "stop"
        logprobs = [-0.01 * place for place in range(len(kept))]
        completion = Completion(kept, logprobs, reason, [(self.version, len(kept))], request.request_id)
        self.made.append((request, completion))
        return completion

    def _nothing(self, *_: Any) -> None: ...

    update_weights = pause = resume = abort = sleep = wake = _nothing  # type: ignore[assignment]


@pytest.fixture(scope="session")
def scripted() -> type[ScriptedEngine]:
    """Makes engines that answer with given texts."""
    return ScriptedEngine


class World:
    """Writes environments of users into a file and plays them with scripted replies.

    Attributes:
        sample: of every episode.
    """

    def __init__(self, folder: Path, policy: Path) -> None:
        self.folder, self.policy = folder, policy
        self.limits = EpisodeLimits(max_turns=8, max_tokens=400, max_model_len=600, timeout_s=60.0)
        hi = [{"role": "user", "content": "hi"}]
        self.sample = PromptSample([3, 77, 78, 1, 4], hi, ground_truth="7", extra={"level": 3}, position=12)

    def engine(self, answer: Callable[[str], str]) -> ScriptedEngine:
        return ScriptedEngine(answer)

    def runner(self, code: str, name: str = "World", **options: Any) -> EpisodeRunner:
        file = self.folder / "world.py"
        file.write_text("import asyncio, os, time\nfrom rlcore_agents import *\n" + code)
        settings = PythonEnvironmentSettings(path=f"{file}:{name}", **options)
        spec = EpisodeSpec(ModelSettings(path=str(self.policy)), settings, SamplingParams(64, seed=0), self.limits)
        runner: EpisodeRunner = plugins.get("rlcore.environments", "python").build(spec)
        return runner

    def run(self, runner: EpisodeRunner, engine: RolloutEngine, seed: int = 5) -> Trajectory:
        return asyncio.run(runner.run(engine, self.sample, seed))

    def play(self, code: str, answer: Callable[[str], str] = lambda prompt: "ok", **options: Any) -> Trajectory:
        runner = self.runner(code, **options)
        try:
            return self.run(runner, self.engine(answer))
        finally:
            runner.close()


@pytest.fixture(scope="session")
def worlds(policy: Path) -> Callable[[Path], World]:
    """Makes places, in a folder, where environments of users are written and played."""
    return lambda folder: World(folder, policy)


@pytest.fixture
def world(tmp_path: Path, worlds: Callable[[Path], World]) -> World:
    return worlds(tmp_path)
