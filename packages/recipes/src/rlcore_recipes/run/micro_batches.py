"""Token budgets of micro-batches that fit into memory (``max_tokens_per_micro_batch: auto``).

Losses and gradients do not depend on the budgets but for the order in which rounded sums are added up, so that the bits
of the weights do. A run therefore keeps the budgets that it began with: they are in its checkpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast
from warnings import warn

from pydantic import Field

from rlcore.controller import Executor
from rlcore.engines import TrainEngine
from rlcore.engines.step_memory import SAFE, StepMemory
from rlcore.errors import RlcoreWarning
from rlcore_kit.checkpoint.json_file import JsonFile
from rlcore_recipes.ranks import is_main
from rlcore_recipes.settings.roles import AUTO, DEFAULT_TOKENS, ModelRole

GIB = 2**30
ROUNDED = 256


class BudgetState(JsonFile):
    """The state of token budgets in a checkpoint."""

    tokens: dict[str, Annotated[int, Field(ge=1, lt=2**31)]] = Field(
        description="Those that were chosen automatically, by role."
    )


@dataclass(frozen=True)
class Model:
    """A model that takes part in a run: its worker group, and its settings."""

    group: TrainEngine
    role: ModelRole

    @property
    def automatic(self) -> bool:
        """Whether the budget is chosen by the free memory."""
        return self.role.max_tokens_per_micro_batch == AUTO


class MicroBatches:
    """The token budgets of a run's models, by role; a part of the run's state.

    Args:
        longest: tokens of the longest sequence there can be, which may stand alone in a micro-batch beyond the budget.
        largest: tokens that one process has to do with in a step at most.
    """

    described_by = BudgetState

    def __init__(self, executor: Executor, models: Mapping[str, Model], longest: int, largest: int) -> None:
        self._executor = executor
        self._models = models
        self._longest = longest
        self._largest = largest
        self.memory = {name: _of_ranks(executor.apply(model.group, step_memory)) for name, model in models.items()}
        self._later = sum(memory.later for memory in self.memory.values() if memory is not None)
        self.tokens = {name: self._fitting(name) for name in models}
        for name in models:
            self._set(name)
            self._warn(name)

    def state(self) -> dict[str, Any]:
        """Return the budgets that were chosen automatically."""
        return {"tokens": {name: self.tokens[name] for name, model in self._models.items() if model.automatic}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the budgets of the run that is resumed, if they still fit into memory."""
        for name, tokens in state["tokens"].items():
            if name not in self._models or not self._models[name].automatic or tokens == self.tokens[name]:
                continue
            memory = self.memory[name]
            if memory is not None and tokens > self.tokens[name] and self._needed(memory, tokens) > memory.free:
                if is_main():
                    warn(
                        f"micro-batches of the {name} had up to {tokens} tokens before, which does not fit into memory "
                        f"now; with {self.tokens[name]} the run goes on, but not to the same last bit",
                        RlcoreWarning,
                        stacklevel=2,
                    )
                continue
            self.tokens[name] = tokens
            self._set(name)

    def lines(self) -> list[str]:
        """Return a line per model: its budget, and the memory that it takes."""
        found = []
        for name, memory in self.memory.items():
            budget = f"{name} up to {self.tokens[name]} tokens"
            if memory is not None:
                needed = self._needed(memory, min(self.tokens[name], self._largest)) / GIB
                budget += f" (about {needed:.1f} of {memory.free / GIB:.1f} GiB free)"
            found.append(budget)
        return found

    def _fitting(self, name: str) -> int:
        memory, model = self.memory[name], self._models[name]
        if not model.automatic:
            return cast(int, model.role.max_tokens_per_micro_batch)
        if memory is None:
            return DEFAULT_TOKENS
        tokens = int(SAFE * memory.free - self._later - memory.fixed) // memory.per_token
        tokens -= tokens % ROUNDED if tokens > ROUNDED else 0
        return min(max(tokens, 1), DEFAULT_TOKENS)

    def _needed(self, memory: StepMemory, tokens: int) -> int:
        return self._later + memory.needed(max(tokens, self._longest))

    def _set(self, name: str) -> None:
        if self.memory[name] is not None and self._models[name].automatic:
            self._executor.apply(self._models[name].group, set_token_budget, self.tokens[name])

    def _warn(self, name: str) -> None:
        memory, tokens = self.memory[name], min(self.tokens[name], self._largest)
        if memory is None or not is_main() or self._needed(memory, tokens) <= memory.free:
            return
        why = (
            f"a sequence of up to {self._longest} tokens"
            if tokens <= self._longest
            else f"{name}.max_tokens_per_micro_batch={self.tokens[name]}"
        )
        warn(
            f"{why} may not fit into memory: a step of the {name} takes about {self._needed(memory, tokens) / GIB:.1f} "
            f"GiB beyond what is in use, and {memory.free / GIB:.1f} GiB are free; choose a smaller budget (or auto), "
            "shorter sequences, gradient checkpointing or adapters",
            RlcoreWarning,
            stacklevel=3,
        )


def step_memory(engine: TrainEngine) -> StepMemory | None:
    """Return the memory that a step of ``engine`` takes; None if unknown."""
    return engine.step_memory()


def set_token_budget(engine: TrainEngine, tokens: int) -> None:
    """Set the token budget of ``engine``."""
    engine.set_token_budget(tokens)


def _of_ranks(memories: list[StepMemory | None]) -> StepMemory | None:
    """Return the minimum that is free for any rank, and the maximum needed; ranks on one device share its memory."""
    known = [memory for memory in memories if memory is not None]
    if len(known) < len(memories):
        return None
    together = Counter(memory.place for memory in known)
    return replace(
        known[0],
        free=min(memory.free // together[memory.place] for memory in known),
        later=max(memory.later for memory in known),
        fixed=max(memory.fixed for memory in known),
        per_token=max(memory.per_token for memory in known),
    )
