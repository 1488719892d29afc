"""The reference's log-probs of a whole data set, computed before the first step and kept in the folder of the run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlcore.batch import Batch
from rlcore.boundary import boundary
from rlcore.engines import ModelSettings
from rlcore.engines.settings import adapter_rank
from rlcore.errors import DataError
from rlcore_recipes.data.sample_data import SampleDataset
from rlcore_recipes.ranks import is_main, on_rank_zero
from rlcore_recipes.run.dataset_session import DatasetSession
from rlcore_recipes.settings.preference import PreferenceConfig
from rlcore_recipes.step.preferences import summed_logprobs
from rlcore_recipes.step.reference import reference_forward

FOLDER = "reference"
COLUMN = "ref_answer_logprob"


@dataclass(frozen=True)
class WithReference(SampleDataset[Any]):
    """The samples of ``source`` for batches alone, with the reference's log-prob of every answer.

    Attributes:
        logprobs: ``[N, R]`` fp64 of N samples with R rows each.
    """

    source: SampleDataset[Any] | None = None
    logprobs: torch.Tensor | None = None

    def take(self, indices: Iterable[int]) -> Batch:
        """Return samples as ``source`` does, with the column ``ref_answer_logprob`` (dense fp64)."""
        assert self.source is not None
        assert self.logprobs is not None
        chosen = list(indices)
        return self.source.take(chosen).with_columns(**{COLUMN: self.logprobs[chosen].flatten()})


def precompute_reference(session: DatasetSession[PreferenceConfig]) -> None:
    """Give the samples of ``session`` the reference's log-probs, if the configuration says so.

    They are read from the folder of the run if they are there for the same model, data and tokens; else computed, by
    the reference's engine or, without one, by the actor, which is not trained yet.
    """
    if not session.config.precompute_ref:
        return
    data = session.batches.data
    assert isinstance(data, SampleDataset)
    model = on_rank_zero(lambda: fingerprint_of_model(session.config))
    session.batches.data = _with_reference(session, data, model, "training")
    if session.held_out is not None:
        session.held_out = _with_reference(session, session.held_out, model, "validation")


def _with_reference(
    session: DatasetSession[PreferenceConfig], data: SampleDataset[Any], model: str, what: str
) -> SampleDataset[Any]:
    file = session.config.trainer.out_dir / FOLDER / f"{what}-{fingerprint_of_samples(data, model)}.arrow"
    found = on_rank_zero(lambda: _read(file, len(data), what))
    if found is None:
        found = _computed(session, data, what)
        on_rank_zero(lambda: _write(file, found))
    elif is_main():
        print(f"reference log-probs of {len(data):,} {what} samples from {file}", file=sys.stderr)
    return WithReference(data.samples, data.file_sizes, source=data, logprobs=found)


def _computed(session: DatasetSession[PreferenceConfig], data: SampleDataset[Any], what: str) -> torch.Tensor:
    """Compute the log-probs ``[N, R]`` of all samples."""
    config = session.config
    if is_main():
        print(f"computing reference log-probs of {len(data):,} {what} samples", file=sys.stderr)
    adapted = adapter_rank(config.actor.options) is not None
    ref = session.ref if session.ref is not None or adapted else session.actor
    parts = []
    for start in range(0, len(data), config.data.train_batch_size):
        indices = range(start, min(start + config.data.train_batch_size, len(data)))
        found = reference_forward(session.actor, ref, data.take(indices))
        sums = session.executor.compute(summed_logprobs, found.select("logprobs"))
        parts.append(sums.reshape(len(indices), -1))
    if session.ref is not None:
        session.ref.offload()  # not used again
    return torch.cat(parts)


def fingerprint_of_model(config: PreferenceConfig) -> str:
    """Return a hash of the reference model's files, and of all settings that its log-probs depend on."""
    model = config.ref.model or config.model
    _, options = config.ref.engine_with(config.actor)
    return hashlib.sha256("\n".join([*_files(model), options.model_dump_json()]).encode()).hexdigest()


def _files(model: ModelSettings) -> list[str]:
    """Return a hash of each file of a model folder; a model of the Hub is known by its name."""
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        return [model.path]
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            with boundary(f"{file} cannot be read"), file.open("rb") as content:
                found.append(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}")
    return found


def fingerprint_of_samples(data: SampleDataset[Any], model: str) -> str:
    """Return a hash of every token of ``data`` and which of them are an answer's, and of ``model``."""
    digest = hashlib.sha256(model.encode())
    for index in range(len(data)):
        rows = data.take([index])
        digest.update(json.dumps(rows.lengths.tolist()).encode())
        digest.update(rows.flat("tokens").numpy().tobytes())
        digest.update(rows.flat("loss_mask").numpy().tobytes())
    return digest.hexdigest()[:32]


def _read(file: Path, samples: int, what: str) -> torch.Tensor | None:
    """Return what `_write` wrote; None if there is nothing, or if it is damaged."""
    if not file.is_file():
        if any(file.parent.glob(f"{what}-*.arrow")):
            print(
                f"the reference log-probs in {file.parent} are of another model or of other {what} samples, and are "
                "computed for these",
                file=sys.stderr,
            )
        return None
    try:
        found: torch.Tensor = Batch.load(file)[COLUMN]
    except DataError as error:
        print(f"{error}; the reference log-probs are computed again", file=sys.stderr)
        return None
    return found.clone() if len(found) == samples else None


def _write(file: Path, logprobs: torch.Tensor) -> None:
    with boundary(f"reference log-probs cannot be written to {file}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        Batch({COLUMN: logprobs}).save(file)
