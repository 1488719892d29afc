"""The results of one model: a file with one line per prompt, which an interrupted evaluation continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from rlcore.boundary import boundary
from rlcore.engines import RewardResult
from rlcore.engines.episode import PromptSample
from rlcore.errors import ConfigError, DataError
from rlcore_kit.checkpoint import json_file
from rlcore_kit.checkpoint.json_file import Count, Finite, JsonFile


class Header(JsonFile):
    """First line of the file: of what the results are."""

    format: Literal[1] = 1
    source: str = Field(description="The model, as it was named.")
    weights: str = Field(description="Fingerprint of its weights.")
    prompts: str = Field(description="Fingerprint of the prompts, as the model's tokenizer writes them.")


class Answer(JsonFile):
    """One completion and its score."""

    text: str
    tokens: Count = Field(description="Length in tokens.")
    finish_reason: Literal["stop", "length", "abort"]
    score: Finite
    answer: str | None = Field(None, description="The answer that the reward read, for the majority vote.")
    extras: dict[str, Finite] = Field({}, description="Further numbers of the reward.")
    error: str | None = Field(None, description="Kind of failure if the reward failed.")

    @property
    def result(self) -> RewardResult:
        """What the reward returned."""
        return RewardResult(self.score, self.extras, self.answer, self.error)


class Record(JsonFile):
    """A prompt and all its completions."""

    key: str = Field(description="Fingerprint of the row, by which results of several models are paired.")
    data_source: str
    prompt: Any = Field(description="The messages.")
    ground_truth: Any = None
    answers: list[Answer] = Field(min_length=1)


def keys_of(samples: Iterable[PromptSample]) -> list[str]:
    """Return a key for each sample: a hash of its row, numbered where rows are equal."""
    seen: dict[str, int] = {}
    found = []
    for sample in samples:
        row = [sample.messages, sample.data_source, sample.ground_truth]
        digest = hashlib.blake2b(json.dumps(row, default=str).encode(), digest_size=8).hexdigest()
        seen[digest] = seen.get(digest, -1) + 1
        found.append(digest if not seen[digest] else f"{digest}-{seen[digest]}")
    return found


class ResultsFile:
    """The file of one model's results.

    Args:
        header: must be that of the file, if there is one.

    Raises:
        ConfigError: the file holds results of other weights or prompts.
        DataError: it is damaged before its last line.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        if not path.exists():
            with boundary(f"{path} cannot be written", ConfigError):
                path.write_bytes(header.encoded() + b"\n")
            return
        first, *lines = self._complete_lines()
        found = _parsed(first, Header, f"{path}, line 1")
        for what in ("weights", "prompts"):
            if getattr(found, what) != getattr(header, what):
                raise ConfigError(
                    f"{path} holds results of other {what} than those of {header.source} now: give another --out, or "
                    "--overwrite to start from the beginning"
                )
        for number, line in enumerate(lines, 2):
            record = _parsed(line, Record, f"{path}, line {number}")
            self.records[record.key] = record

    def _complete_lines(self) -> list[bytes]:
        """Return the lines of the file, and cut off a last one that a killed process did not finish."""
        with boundary(f"{self.path} cannot be read"):
            content = self.path.read_bytes()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                os.truncate(self.path, end)
        if not end:
            raise DataError(f"{self.path} is damaged: its first line is incomplete; delete it")
        return content[:end].splitlines()

    def append(self, records: Sequence[Record]) -> None:
        """Add records, and flush them to disk.

        Raises:
            DataError: they cannot be written.
        """
        with boundary(f"results cannot be written to {self.path}"), self.path.open("ab") as file:
            file.write(b"".join(record.encoded() + b"\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
        self.records |= {record.key: record for record in records}

    def in_order(self, keys: Iterable[str]) -> Iterator[Record]:
        """Yield the records of ``keys``."""
        return (self.records[key] for key in keys)


def _parsed(line: bytes, kind: type[Any], where: str) -> Any:
    try:
        return kind.model_validate_json(line, strict=True)
    except ValidationError as error:
        raise DataError(f"{where} is damaged: {json_file.first_problem(error)}") from None
