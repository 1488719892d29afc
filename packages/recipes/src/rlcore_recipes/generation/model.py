"""A model that is ready to generate: its tokenizer and chat template, its end tokens, its engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlcore.engines import ModelSettings, RolloutEngine, SamplingParams
from rlcore_kit.model_folder.vocabulary import positions
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.end_tokens import missing_ends, model_tokens, written_ends
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.generation.candidates import Candidate
from rlcore_recipes.generation.engines import rollout_engine
from rlcore_recipes.rollouts.sampling import validation_sampling
from rlcore_recipes.run.preflight import check_sources
from rlcore_recipes.settings.generation import GenerationConfig


@dataclass(frozen=True)
class LoadedModel:
    """A model's files, read.

    Attributes:
        vocabulary: number of tokens that it knows.
        positions: maximum number of tokens of a sequence; None if unknown.
        sampling: of a completion, with all tokens that end one.
    """

    config: GenerationConfig
    model: ModelSettings
    tokenizer: Any
    renderer: Renderer
    vocabulary: int
    positions: int | None
    sampling: SamplingParams

    @property
    def chats(self) -> bool:
        """Whether texts are messages of a user: the model has a chat template, and it is to be used."""
        return bool(self.tokenizer.chat_template) and self.config.data.apply_chat_template != "never"

    @contextmanager
    def engine(self, longest: int, requests: int) -> Iterator[RolloutEngine]:
        """Build the rollout engine, and close it at the end.

        Args:
            longest: maximum tokens of a prompt and its completion.
            requests: maximum number at the same time; the inline engine reserves no memory for more.
        """
        rollout, name = self.config.rollout, self.config.rollout.engine
        if hasattr(rollout.options, "max_running"):
            few = rollout.options.model_copy(update={"max_running": min(requests, rollout.options.max_running)})
            rollout = rollout.model_copy()
            rollout.__pydantic_extra__ = {name: few}
        engine = rollout_engine(self.model, rollout, longest, self.config.seed)
        try:
            yield engine
        finally:
            engine.close()


@contextmanager
def loaded_model(config: GenerationConfig, candidate: Candidate) -> Iterator[LoadedModel]:
    """Read the files of the model; a checkpoint is exported to a temporary folder first.

    Raises:
        RlcoreError: a file is missing or broken.
    """
    with candidate.folder() as folder:
        model = config.model.model_copy(update={"path": folder})
        check_sources(model, [])
        tokenizer = load_tokenizer(model)
        renderer, (vocabulary, _) = Renderer(config.data, tokenizer), model_tokens(model)
        stop_tokens = missing_ends(model, tokenizer, written_ends(renderer, bool(tokenizer.chat_template)))
        sampling = validation_sampling(config.rollout, config.data.max_response_length, stop_tokens)
        yield LoadedModel(config, model, tokenizer, renderer, vocabulary, positions(model), sampling)
