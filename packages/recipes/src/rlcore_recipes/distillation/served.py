"""Teachers that run as servers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlcore import plugins
from rlcore.batch import Batch
from rlcore.controller import Executor
from rlcore.engines import ModelSettings, ScoringEngine, ScoringRequest, ScoringSpec
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
    """Return the columns that ``request`` names, 0 where ``loss_mask`` is 0."""
    mask, tokens = batch.flat("loss_mask") > 0, batch["tokens"].to_list()
    trained = [row.nonzero().flatten().tolist() for row in batch["loss_mask"].to_list()]
    starts = {row: max(found[0], 1) for row, found in enumerate(trained) if found}
    asked = [ScoringRequest(tokens[row].tolist(), start, request.top_k, str(row)) for row, start in starts.items()]
    scores = on_rank_zero(lambda: servers.client().score_batch(asked)) if asked else []
    columns: dict[str, torch.Tensor] = {}
    if request.logprobs:
        columns["logprobs"] = torch.zeros(len(mask))
    if request.top_k:
        columns["top_ids"] = torch.zeros(len(mask), request.top_k, dtype=torch.int64)
        columns["top_logprobs"] = torch.zeros(len(mask), request.top_k)
    ends = batch.lengths.cumsum(0).tolist()
    for row, found in zip(starts, scores, strict=True):
        for name, values in columns.items():
            values[ends[row] - len(found.logprobs) : ends[row]] = getattr(found, name)
    for values in columns.values():
        values[~mask] = 0
    return Batch({f"teacher_{name}": batch.jagged(values) for name, values in columns.items()})
