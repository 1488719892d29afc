"""Teachers that run as servers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from rlcore import plugins
from rlcore.batch import Batch
from rlcore.controller import Executor
from rlcore.engines import ModelSettings, ScoringEngine, ScoringRequest, ScoringSpec, TokenScores
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.distillation.teacher import TeacherRequest
from rlcore_recipes.ranks import on_rank_zero
from rlcore_recipes.settings.distillation import ScoringRole

_engines: dict[str, ScoringEngine] = {}
"""Clients of this process, which are used in every step."""


@dataclass(frozen=True)
class Servers:
    """A teacher's servers.

    Attributes:
        tokenizer: the model whose tokenizer is the servers'.
        top_k: largest number of likeliest tokens that are asked for.
    """

    scoring: ScoringRole
    tokenizer: ModelSettings
    top_k: int

    def connect(self, max_length: int | None = None) -> ScoringEngine:
        """Return a client, after its checks of the servers.

        Args:
            max_length: longest sequence of the run; None leaves its check to the servers.

        Raises:
            EngineError: a server does not pass.
        """
        spec = ScoringSpec(self.scoring.options, load_tokenizer(self.tokenizer), max_length, self.top_k)
        built: ScoringEngine = plugins.get(self.scoring.plugin_group, self.scoring.engine).build(spec)
        return built

    def client(self) -> ScoringEngine:
        """Return the client of this process, which is connected once."""
        key = repr(self)
        if key not in _engines:
            _engines[key] = self.connect()
        return _engines[key]


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher behind servers; a worker process asks them, where the batch is in worker processes."""

    executor: Executor
    servers: Servers

    def add_columns(self, batch: Batch, request: TeacherRequest) -> Batch:
        """See `rlcore_recipes.distillation.teacher.Teacher`; log-probs are those of temperature 1.

        Raises:
            EngineError: no server is left, or one refuses a sequence.
        """
        found = self.executor.compute(scored, batch.select("tokens", "loss_mask"), self.servers, request)
        return batch.with_columns(**{name: found[name] for name in found.names})


def scored(batch: Batch, servers: Servers, request: TeacherRequest) -> Batch:
    """Return the columns that ``request`` names, from the first token of each row on that is trained."""
    mask = batch.flat("loss_mask") > 0
    rows = [row.nonzero().flatten().tolist() for row in batch["loss_mask"].to_list()]
    asked = [
        ScoringRequest(tokens.tolist(), max(trained[0], 1), request.top_k, str(index))
        for index, (tokens, trained) in enumerate(zip(batch["tokens"].to_list(), rows))
        if trained
    ]
    scores = iter(on_rank_zero(lambda: servers.client().score_batch(asked)) if asked else [])
    starts = iter(asked)
    parts = [
        _padded(next(scores), next(starts).start) if trained else _padded(_nothing(length, request.top_k), 0)
        for trained, length in zip(rows, batch.lengths.tolist())
    ]
    names = ("logprobs",) * request.logprobs + ("top_ids", "top_logprobs") * (request.top_k > 0)
    columns: dict[str, Any] = {}
    for name in names:
        values = torch.cat([getattr(part, name) for part in parts])
        values[~mask] = 0
        columns[f"teacher_{name}"] = batch.jagged(values)
    return Batch(columns)


def _nothing(length: int, top_k: int) -> TokenScores:
    return TokenScores(torch.zeros(length), torch.zeros(length, top_k, dtype=torch.int64), torch.zeros(length, top_k))


def _padded(scores: TokenScores, start: int) -> TokenScores:
    """Return ``scores`` with zeros for the first ``start`` tokens."""

    def pad(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.new_zeros(start, *values.shape[1:]), values])

    return replace(
        scores, logprobs=pad(scores.logprobs), top_ids=pad(scores.top_ids), top_logprobs=pad(scores.top_logprobs)
    )
