"""Where verifiers' train client sends the model calls of episodes: one address, and a session per episode behind it.

verifiers keeps an HTTP client for every configuration of an endpoint, so that all episodes share one address and one
key. Its train client names the agent's run (the trace) in a header; the run belongs to an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from rlcore.engines.episode import EpisodeLimits
from rlcore.engines.rollout import Completion, RolloutEngine, SamplingParams
from rlcore_agents.endpoint import Endpoint, Refusal, Session
from rlcore_agents.endpoint.endpoint import Route
from rlcore_agents.endpoint.token_protocol import generate, models

if TYPE_CHECKING:
    from verifiers.v1 import Trace

MODEL = "policy"
"""The name of the model that is trained."""
RUN_HEADER = "x-session-id"


@dataclass(eq=False)
class EpisodeCalls(Session):
    """Model calls of one episode.

    Attributes:
        limits: ``max_tokens`` bounds everything after the first prompt of an agent's run.
        runs: its agents' runs, by id.
        on_failure: called when the rollout engine fails: agents would ask again and again.
    """

    limits: EpisodeLimits = field(kw_only=True)
    on_failure: Callable[[], object] = field(default=lambda: None, repr=False)
    runs: dict[str, Trace] = field(default_factory=dict)
    _first_prompts: dict[str, int] = field(default_factory=dict)

    def room(self, run: str, prompt: Sequence[int]) -> int:
        """Return how many tokens may follow ``prompt`` in the conversation of ``run``.

        Without room the run ends, as at verifiers' own limits, unless its agent can compact its history.

        Raises:
            Refusal: there is none; agents know the words for a context that is used up.
        """
        first = self._first_prompts.setdefault(run, len(prompt))
        longest = min(first + self.limits.max_tokens, self.limits.max_model_len)
        if len(prompt) >= longest:
            trace = self.runs[run]
            if getattr(trace.agent.config.harness, "compaction", None) is None:
                trace.stop("max_total_tokens")
            raise Refusal(400, f"the prompt has {len(prompt)} tokens, and the maximum context length is {longest}")
        return longest - len(prompt)

    async def generate(self, prompt: Sequence[int], wanted: SamplingParams) -> Completion:
        """Sample one completion, as `Session.generate` does."""
        try:
            return await super().generate(prompt, wanted)
        finally:
            if self.failure is not None:
                self.on_failure()

    def completions(self) -> Mapping[tuple[tuple[int, ...], tuple[int, ...]], Completion]:
        """Return the completions by the tokens of prompt and completion."""
        return {(tuple(call.request.prompt), tuple(call.completion.tokens)): call.completion for call in self.calls}


class CallServer:
    """The address, for as many episodes as there are.

    Args:
        sampling: its stop tokens end completions, besides those of the renderer.
    """

    def __init__(self, engine: RolloutEngine, limits: EpisodeLimits, sampling: SamplingParams) -> None:
        self._engine, self._limits, self._sampling = engine, limits, sampling
        self._episodes: dict[str, EpisodeCalls] = {}
        self._endpoint = Endpoint(
            (Route("/v1/models", _models, method="GET"), Route("/inference/v1/generate", self._generate))
        )
        identity = self._endpoint.identity("verifiers")
        self._address = Session(
            engine, f"{self._endpoint.url}/sessions/{identity}", identity, MODEL, limits.max_model_len
        )
        self._serving = self._endpoint.serving(self._address)
        self._serving.__enter__()

    @property
    def base_url(self) -> str:
        """Base URL of the train client."""
        return f"{self._address.url}/v1"

    @property
    def key(self) -> str:
        """Key of the address."""
        return self._address.key

    @contextmanager
    def episode(self, name: str, seed: int) -> Iterator[EpisodeCalls]:
        """Answer the calls of an episode until the end of the block."""
        calls = EpisodeCalls(
            self._engine, self._address.url, name, MODEL, self._limits.max_model_len, seed=seed, limits=self._limits
        )
        try:
            yield calls
        finally:
            for run in tuple(calls.runs):
                del self._episodes[run]

    def add_run(self, trace: Trace, calls: EpisodeCalls) -> None:
        """Answer the calls of an agent's run as those of an episode."""
        calls.runs[trace.id] = trace
        self._episodes[trace.id] = calls

    def close(self) -> None:
        """Stop serving."""
        self._serving.__exit__(None, None, None)
        self._endpoint.close()

    async def _generate(self, address: Session, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
        run = headers.get(RUN_HEADER, "")
        calls = self._episodes.get(run)
        if calls is None:
            raise Refusal(404, f"run {run!r} has ended, or there never was one; its requests are no longer answered")
        wanted = dict(body.get("sampling_params") or {})
        room = calls.room(run, body.get("token_ids") or ())
        wanted["max_tokens"] = min(wanted.get("max_tokens") or room, room)
        wanted["stop_token_ids"] = [*wanted.get("stop_token_ids", ()), *self._sampling.stop_token_ids]
        return JSONResponse(dict(await generate(calls, {**body, "sampling_params": wanted})))


async def _models(address: Session, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    return JSONResponse(dict(models(address)))
