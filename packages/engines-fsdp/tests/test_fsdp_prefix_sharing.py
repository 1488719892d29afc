"""Shared prefixes: the layout against a plain trie, and the engine with them against the engine without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.algorithms.objectives import PolicyObjective, PolicyObjectiveSettings
from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngineSpec
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.prefix_sharing import SHORTEST, divide_families, share_prefixes
from rlcore_fsdp.settings import FSDPSettings


def conversations(seed: int, length: int = 24) -> list[list[int]]:
    """Rows that branch where others have, of a few tokens each; some are equal, some the beginning of others."""
    chance = random.Random(seed)

    def text(count: int) -> list[int]:
        return [chance.randrange(3, 90) for _ in range(count)]

    rows: list[list[int]] = [text(chance.randrange(1, 2 * length))]
    for _ in range(11):
        kept = chance.choice(rows)[: chance.randrange(0, 3 * length)]
        rows.append(kept + text(chance.randrange(0 if kept else 1, length)))
    return rows


def flat(rows: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
    return torch.tensor([token for row in rows for token in row]), [len(row) for row in rows]


@pytest.mark.parametrize("seed", range(20))
def test_the_layout_has_every_distinct_prefix_once(seed: int) -> None:
    rows = conversations(seed)
    tokens, lengths = flat(rows)
    shared = share_prefixes(tokens, lengths)
    distinct = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    if shared is None:
        return
    laid = tokens[shared.tokens]
    assert torch.equal(laid[shared.places], tokens)
    assert sum(shared.runs) == len(laid)
    short = SHORTEST * len(rows)  # what is too short to be shared may be there several times
    assert len(distinct) <= len(laid) <= len(distinct) + short
    start = 0
    for run, first, prefix in zip(shared.runs, shared.first, shared.prefixes):
        before = [int(token) for piece in prefix for token in laid[slice(*piece)]]
        assert len(before) == first
        whole = before + laid[start : start + run].tolist()
        assert whole in rows
        assert all(stop <= start for _, stop in prefix)
        start += run


def test_families_stay_within_the_budget_and_hold_every_row_once() -> None:
    rows = [[*range(3, 43), *[row] * 10] for row in range(60, 70)] + [[5, 6, 7]]
    families, sizes = divide_families(*flat(rows), max_tokens=100)
    assert sorted(row for family in families for row in family) == list(range(11))
    assert sizes == [40 + 6 * 10, 40 + 4 * 10, 3]
    assert divide_families(*flat(rows), max_tokens=20)[1] == [50] * 10 + [3]


def engine(path: Path, head: str = "policy", **options: Any) -> FSDPTrainEngine:
    settings = FSDPSettings(device="cpu", **options)
    optim = OptimSettings(lr=1e-2, weight_decay=0.0)
    return build(TrainEngineSpec(ModelSettings(path=str(path)), settings, head=head, optim=optim, max_tokens=300))


def tree(head: str) -> Batch:
    tokens, lengths = flat(conversations(3, 40))
    generator = torch.Generator().manual_seed(0)
    column = lambda: Jagged(torch.rand(len(tokens), generator=generator), torch.tensor(lengths))  # noqa: E731
    mask = Jagged((torch.rand(len(tokens), generator=generator) < 0.6).float(), torch.tensor(lengths))
    columns = {"tokens": Jagged(tokens, torch.tensor(lengths)), "loss_mask": mask, "advantages": column()}
    return Batch({**columns, "old_logprobs": column(), "weights": column()})


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 4}}], ids=str)
@pytest.mark.parametrize("head", ["policy", "value"])
def test_sharing_changes_neither_outputs_nor_updates(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, options: dict[str, Any]
) -> None:
    from rlcore_kit.testing.train_engine.objectives import SquaredError

    batch = tree(head)
    request = ForwardRequest(("logprobs", "entropy") if head == "policy" else ("values",))
    objective = PolicyObjective(PolicyObjectiveSettings(entropy_coeff=0.1)) if head == "policy" else SquaredError()
    found, tokens = [], []
    for share in (True, False):
        one = engine(tiny_model_path, head, share_prefixes=share, **options)
        forward = one.root.model.base_model.forward
        counted: list[int] = []

        def counting(*args: Any, forward: Any = forward, counted: list[int] = counted, **kwargs: Any) -> Any:
            counted.append(kwargs["input_ids"].numel())
            return forward(*args, **kwargs)

        monkeypatch.setattr(one.root.model.base_model, "forward", counting)
        before = one.forward(batch, request)
        losses = [one.train(batch, objective).to_dict() for _ in range(3)]
        found.append((before, losses, one.forward(batch, request)))
        tokens.append(sum(counted))
    for name in request.outputs:
        for step in (0, 2):
            a, b = (result[step].flat(name) for result in found)
            torch.testing.assert_close(a, b, atol=2e-5 if step else 1e-6, rtol=0)
    for a, b in zip(found[0][1], found[1][1]):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-4)
    assert tokens[0] < 0.8 * tokens[1]
