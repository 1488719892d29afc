"""Token budgets that fit into memory."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from rlcore.engines.step_memory import StepMemory
from rlcore.errors import RlcoreWarning
from rlcore_recipes.run.micro_batches import MicroBatches, Model
from rlcore_recipes.settings.roles import ModelRole


class Engine:
    def __init__(self, *memories: StepMemory | None) -> None:
        self.memories = memories
        self.budget: int | None = None


class Ranks:
    """An executor whose groups have one rank for each memory of the engine."""

    def apply(self, engine: Engine, function: Any, *args: Any) -> list[Any]:
        if args:
            engine.budget = args[0]
            return [None]
        return list(engine.memories)


def memory(free: int, later: int = 0, fixed: int = 0, per_token: int = 1, place: str = "here") -> StepMemory:
    return StepMemory(place=place, free=free, later=later, fixed=fixed, per_token=per_token, parameters=1)


def budgets(longest: int = 10, largest: int = 10**6, **models: tuple[Engine, Any]) -> MicroBatches:
    roles = {
        name: Model(engine, ModelRole(max_tokens_per_micro_batch=tokens))  # type: ignore[arg-type]
        for name, (engine, tokens) in models.items()
    }
    return MicroBatches(Ranks(), roles, longest, largest)  # type: ignore[arg-type]


def test_budgets_fit_into_what_all_models_leave() -> None:
    actor = Engine(memory(10_000, later=1000, fixed=500, per_token=2), memory(20_000, later=1000, place="b"))
    critic = Engine(memory(10_000, later=2000, per_token=1))
    ref, unknown = Engine(memory(10**9)), Engine(None)
    found = budgets(actor=(actor, "auto"), critic=(critic, 1234), ref=(ref, "auto"), reward_model=(unknown, "auto"))
    # (0.8 · 10,000 − 3,000 − 500) / 2 = 2,250, in whole 256
    assert found.tokens == {"actor": 2048, "critic": 1234, "ref": 16384, "reward_model": 16384}
    assert (actor.budget, critic.budget, ref.budget, unknown.budget) == (2048, None, 16384, None)
    assert found.lines()[3] == "reward_model up to 16384 tokens"
    assert re.fullmatch(r"actor up to 2048 tokens \(about .* of .* GiB free\)", found.lines()[0])


def test_ranks_share_the_memory_of_a_place() -> None:
    shared = Engine(memory(10_000, place="a"), memory(10_000, place="a"), memory(9_000, place="b"))
    assert budgets(actor=(shared, "auto")).tokens == {"actor": 3840}  # 0.8 · 5,000


@pytest.mark.parametrize(
    ("tokens", "longest", "largest", "message"),
    [
        (900, 10, 10**6, None),
        (1001, 10, 10**6, r"actor\.max_tokens_per_micro_batch=1001 may not fit into memory"),
        (1001, 10, 900, None),  # there are never so many
        ("auto", 1000, 10**6, None),
        ("auto", 1001, 10**6, "a sequence of up to 1001 tokens may not fit"),
        (50, 1001, 10**6, "a sequence of up to 1001 tokens may not fit"),
    ],
)
def test_what_will_not_fit_is_warned_about(tokens: Any, longest: int, largest: int, message: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        budgets(longest, largest, actor=(Engine(memory(1000)), tokens))
    assert len(caught) == (message is not None)
    assert message is None or re.search(message, str(caught[0].message))


def test_a_resumed_run_keeps_its_budgets() -> None:
    state = budgets(actor=(Engine(memory(1000)), "auto"), critic=(Engine(memory(1000)), 77)).state()
    assert state == {"tokens": {"actor": 768}}
    actor = Engine(memory(5000))
    resumed = budgets(actor=(actor, "auto"))
    resumed.restore(state)
    assert resumed.tokens["actor"] == actor.budget == 768
    chosen = Engine(memory(5000))
    budgets(actor=(chosen, 55)).restore(state)  # what is configured now counts
    assert chosen.budget is None
    less = budgets(actor=(Engine(memory(900)), "auto"))
    assert less.tokens["actor"] == 512
    less.restore(state)
    assert less.tokens["actor"] == 768  # beyond the safe share, but it still fits
    least = budgets(actor=(Engine(memory(700)), "auto"))
    with pytest.warns(RlcoreWarning, match="up to 768 tokens before, which does not fit into memory now; with 512"):
        least.restore(state)
