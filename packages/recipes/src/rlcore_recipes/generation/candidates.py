"""The models that a command is given: folders, names on the Hub, and checkpoints, which are exported to be loaded."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlcore_recipes.export.model_folder import ExportOptions, export_checkpoint
from rlcore_recipes.export.source import NEWEST, Choice, TrainedModel, find_model


@dataclass(frozen=True)
class Candidate:
    """A model to generate with.

    Attributes:
        name: for tables; no two candidates have the same.
        model: a complete checkpoint, or a model's folder or name.
    """

    name: str
    source: str
    model: TrainedModel | str

    @property
    def file(self) -> str:
        """The name of its file of results."""
        return re.sub(r"[^\w.=-]+", "--", self.name).strip("-") + ".jsonl"

    def fingerprint(self) -> str:
        """Return a hash by which other weights under the same name are noticed."""
        if isinstance(self.model, TrainedModel):
            known: object = self.model.files
        else:
            files = sorted(Path(self.model).glob("*.safetensors"))
            known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files] or self.model
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]

    @contextmanager
    def folder(self) -> Iterator[str]:
        """Have the model as what a rollout engine loads; the export of a checkpoint is deleted at the end."""
        if isinstance(self.model, str):
            yield self.model
            return
        with tempfile.TemporaryDirectory(prefix="rlcore-model-") as temporary:
            folder = Path(temporary) / "model"
            export_checkpoint(self.model, folder, ExportOptions())
            yield str(folder)


def find_candidates(sources: Sequence[str], choice: Choice = NEWEST) -> list[Candidate]:
    """Find the model that each source leads to (`find_model`), and name them."""
    found: list[Candidate] = []
    taken: set[str] = set()
    for source in sources:
        model = find_model(source, choice)
        if isinstance(model, TrainedModel):
            run = Path(model.location.root.rpartition("/")[0]).name
            name = f"{run}/{model.location.name}" if run else model.location.name
        else:
            name = Path(model).name if Path(model).is_dir() else model
        number, unique = 1, name
        while unique in taken:
            number += 1
            unique = f"{name} ({number})"
        taken.add(unique)
        found.append(Candidate(unique, source, model))
    return found
