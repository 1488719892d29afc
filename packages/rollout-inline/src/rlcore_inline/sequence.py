"""`Sequence`: the state of one request while its completion is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rlcore.engines.rollout import Completion, FinishReason, GenerationRequest
from rlcore_inline.stopping import StopStrings


@dataclass(eq=False)
class Sequence:
    """A request and the tokens that have been generated for it.

    Attributes:
        order: ``(priority, arrival)``; lower runs first.
        prompt: prompt as a tuple, so that equal prompts are found by hash.
        end_tokens: tokens that end the completion.
        limit: maximum number of tokens to generate, by the request and by ``max_model_len``.
        stream: start of the request's random numbers.
        stop_strings: finds stop strings; None without any.
        done: called once with the completion, or with the error that ended the request.
        tokens: generated tokens.
        logprobs: log-probs of the generated tokens.
        versions: finished spans ``(version, count)`` of the generated tokens.
        row: row in the cache; −1 before the first.
        prefilled: number of tokens in the last prefill; later tokens were decoded.
    """

    request: GenerationRequest
    order: tuple[int, int]
    prompt: tuple[int, ...]
    end_tokens: frozenset[int]
    limit: int
    stream: int
    stop_strings: StopStrings | None
    done: Callable[[Completion | Exception], None]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    row: int = -1
    prefilled: int = 0

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    @property
    def length(self) -> int:
        """Number of tokens, prompt included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def final_length(self) -> int:
        """Maximum length, prompt included."""
        return len(self.prompt) + self.limit

    def history(self) -> tuple[int, ...]:
        """Return the tokens whose keys and values must be cached before the next step: all except the last."""
        return (self.prompt + tuple(self.tokens))[:-1]  # shift allowed: the part that is cached

    def append(self, token: int, logprob: float) -> FinishReason | None:
        """Append the next token; return the finish reason if it is the last one, else None."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.end_tokens or (self.stop_strings is not None and self.stop_strings.push(token)):
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def close_span(self, version: int) -> None:
        """Record that weights ``version`` generated the tokens since the last span."""
        count = len(self.tokens) - sum(count for _, count in self.versions)
        if count:
            self.versions.append((version, count))

    def rewind(self) -> None:
        """Drop the tokens since the last span; the same tokens will be drawn again."""
        kept = sum(count for _, count in self.versions)
        del self.tokens[kept:], self.logprobs[kept:]
        if self.stop_strings is not None:
            self.stop_strings.restart(self.tokens)

    def finish(self, reason: FinishReason, version: int) -> None:
        """Report the completion; ``version`` is that of the weights of the last span."""
        self.close_span(version)
        logprobs = self.logprobs if self.request.sampling.logprobs else []
        self.done(Completion(self.tokens, logprobs, reason, self.versions, self.request.request_id))
