"""Episodes: how a trajectory of a prompt comes about. The contract of environments.

A *trajectory* is a tree of segments, runs of tokens of one origin: the policy sampled them, or they come from the
prompt, a tool or a user. A conversation that only grows is a tree with one leaf. It branches where its history is
written differently than it was sampled: context compaction, a sub-agent, a template that removes earlier reasoning.
Every path from the root to a leaf becomes one row of a batch. For a call of a tool whose reasoning the next prompt no
longer shows:

    segments   0 prompt   1 sampled "<think>…</think> call"   2 "call", result (parent 0)   3 sampled answer
    rows       0 1        and        0 2 3
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from rlcore.config import Config
from rlcore.engines.rollout import Completion, FinishReason, RolloutEngine, SamplingParams
from rlcore.engines.settings import ModelSettings


@dataclass(frozen=True)
class PromptSample:
    """One prompt.

    Attributes:
        prompt_tokens: token ids, generation prompt included.
        messages: the conversation; one user message for plain text.
        extra: the row's other columns, and the fields of a struct ``extra_info``.
        index: position in its data set.
        position: how many samples the loader drew before this one in the whole run, from which its seed derives; until
            it is drawn it equals ``index``.
        text: the prompt as it is in the file, if it is plain text without a chat template; else None.
        completion: token ids of the response that the file gives, its end token included; None without one.
    """

    prompt_tokens: list[int]
    messages: list[dict[str, Any]]
    ground_truth: Any = None
    data_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    index: int = 0
    position: int = 0
    text: str | None = None
    completion: list[int] | None = None


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one origin.

    Attributes:
        tokens: token ids.
        sampled: True for tokens that the policy sampled, which are trained on; False for those of the prompt, of tools
            and of users.
        logprobs: of sampled tokens, one per token; None if the engine was not asked for them or gave none.
        versions: of sampled tokens, ``(version, count)`` spans in order: the policy that made them.
        parent: index, in the trajectory, of the segment that this one follows; None: the segment before it.
        reward: of a sampled segment, the reward of this turn.
        state: of a sampled segment, what the environment calls the state in which the policy took this turn. Turns of a
            group with equal states can be compared (GiGPO); None: all tokens before the turn are its state.
    """

    tokens: Sequence[int]
    sampled: bool = False
    logprobs: Sequence[float] | None = None
    versions: Sequence[tuple[int, int]] = ()
    parent: int | None = None
    reward: float | None = None
    state: str | None = None


@dataclass(frozen=True)
class Trajectory:
    """The result of an episode; every leaf of its segments becomes one row of a batch.

    Attributes:
        segments: every segment after the one that it follows; the first is the root. Tokens of a row before its first
            sampled segment are the prompt.
        finish_reason: of the last sampled segment; "given" for a completion of the data set.
        info: what the episode knows besides the tokens. Rewards and estimators find it among the sample's ``extra``.
        score: reward of the whole episode, if the episode itself gives one; rewards of turns are in addition.
        invalid: why nothing is to be learned from the episode (its environment failed), as a sentence; "" if valid.
        messages: the conversation with its tool calls and results, for rewards and for people; () without one.
        metrics: numbers to log as means under ``rollout/``.
    """

    segments: tuple[Segment, ...]
    finish_reason: FinishReason | Literal["given"]
    info: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None
    invalid: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    def rows(self) -> list[tuple[int, ...]]:
        """Return the path of segments from the root to each leaf, as indices, in the order of the leaves."""
        paths: list[tuple[int, ...]] = []
        inner = set()
        for index, segment in enumerate(self.segments):
            parent = index - 1 if segment.parent is None else segment.parent
            paths.append((*paths[parent], index) if index else (0,))
            inner.add(parent)
        return [path for index, path in enumerate(paths) if index not in inner]


def sampled_segment(completion: Completion, logprobs: bool, parent: int | None = None) -> Segment:
    """Return the tokens of ``completion``, with log-probs if ``logprobs`` were asked for and the engine gave them."""
    given = logprobs and len(completion.logprobs) == len(completion.tokens)
    return Segment(completion.tokens, True, completion.logprobs if given else None, completion.versions, parent)


@dataclass(frozen=True)
class EpisodeLimits:
    """What an episode may use.

    Attributes:
        max_turns: completions of the policy.
        max_tokens: tokens of a row after its prompt, those of tools and users included.
        max_model_len: tokens of a row.
        timeout_s: seconds of an episode.
    """

    max_turns: int
    max_tokens: int
    max_model_len: int
    timeout_s: float


@dataclass(frozen=True)
class EpisodeSpec:
    """Everything a plugin needs to build one `EpisodeRunner` of a rollout process.

    Attributes:
        sampling: of every completion; ``max_tokens`` bounds a turn, its seed is each episode's own.
        chat_template: in place of the model's; None: the model's.
        chat_template_kwargs: variables of the chat template, as for prompts.
        end_tokens: tokens that end an answer.
        purpose: "train" or "validation".
    """

    model: ModelSettings
    options: Config
    sampling: SamplingParams
    limits: EpisodeLimits
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    end_tokens: frozenset[int] = frozenset()
    purpose: str = "train"


class EpisodeRunner(ABC):
    """Runs episodes, many at the same time, in a rollout process, which builds one for the whole run.

    Event loops come and go: nothing that is kept between episodes may belong to one.
    """

    def slot(self) -> AbstractAsyncContextManager[None]:
        """Hold what one episode needs to run, such as a process; the time of the episode begins when it is entered."""
        return nullcontext()

    @abstractmethod
    async def run(self, engine: RolloutEngine, sample: PromptSample, seed: int) -> Trajectory:
        """Run one episode of ``sample``; draw random numbers from ``seed`` alone.

        A failure of what the episode talks to (a tool, a server, an agent program) becomes
        `Trajectory.invalid`, with what was sampled so far; exceptions are failures of the run.
        """

    def close(self) -> None:
        """Release servers and processes; not used afterwards."""
        return
