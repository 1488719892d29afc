"""A tiny policy behind the inline rollout engine, which all files of the session share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlcore import plugins
from rlcore.engines import Completion, GenerationRequest, ModelSettings, RolloutEngine, RolloutSpec
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
    """Answers what a function says of the text of the prompt.

    Attributes:
        prompts: texts of the prompts so far.
    """

    version = 0

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer, self.prompts = answer, list[str]()
        self._tokenizer = tiny_tokenizer()

    async def generate(self, request: GenerationRequest) -> Completion:
        self.prompts.append(self._tokenizer.decode(request.prompt))
        tokens = self._tokenizer.encode(self.answer(self.prompts[-1]) + "<|end|>")
        whole = len(tokens) <= request.sampling.max_tokens
        tokens = tokens[: request.sampling.max_tokens]
        return Completion(tokens, [-0.5] * len(tokens), "stop" if whole else "length", [(0, len(tokens))])

    def update_weights(self, buckets: Any, version: int) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self, request_ids: Any = None) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


@pytest.fixture(scope="session")
def scripted() -> type[ScriptedEngine]:
    """An engine that is made with the function of a prompt that answers it."""
    return ScriptedEngine
