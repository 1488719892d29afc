"""Tokenised data files on disk: a folder with the samples and a description, written once and read memory-mapped.

`rlcore data tokenize` writes them for users. Runs write them to a cache, so that the next start does not
tokenise again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlcore.boundary import boundary
from rlcore.errors import DataError
from rlcore_kit.checkpoint.json_file import Count, JsonFile, read
from rlcore_recipes.data.arrow_data import TOKENIZED, is_tokenized, open_hub
from rlcore_recipes.data.files import HUB, existing_file
from rlcore_recipes.data.settings import AUTO, SFTDataSettings
from rlcore_recipes.data.sft_sample import MappedSamples, SFTSample, write_samples

SAMPLES = "samples.arrow"
CACHED_BYTES = 32 << 20
"""Smaller files are tokenised in seconds, and not kept."""

_ORDER_ONLY = ("train_files", "val_files", "train_batch_size", "val_batch_size", "val_limit", "shuffle", "weights")
_NOT_READ = {*_ORDER_ONLY, "mix", "cache_dir"}


class Report(JsonFile):
    """What the samples of a data file are, and what happened to its rows."""

    format: Literal[1] = 1
    rows: Count = Field(description="Rows of the file that were read.")
    samples: Count = Field(description="Samples made of them.")
    tokens: Count = Field(description="Tokens of the samples.")
    learned: Count = Field(description="Those of them that are learned.")
    longest: Count = Field(description="Tokens of the longest sample.")
    largest: Count = Field(description="The largest token id.")
    cut: Count = Field(0, description="Samples whose end was cut off.")
    overlong: Count = Field(0, description="Samples that were left out as too long.")
    first_overlong: str = Field("", description="The first of them.")
    empty: Count = Field(0, description="Rows that were left out because no token of them is learned.")
    first_empty: str = Field("", description="The first of them.")
    chat: bool = Field(description="Whether the chat template wrote them.")
    tokenizer: str = Field(description="Fingerprint of the tokenizer and its template; empty if it was not used.")
    fingerprint: str = Field(description="Of what the file holds.")
    notes: list[str] = Field([], description="What was recognised in the file.")


@dataclass(frozen=True)
class TokenizedFile:
    """The samples of one data file."""

    samples: Sequence[SFTSample]
    report: Report


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of what decides the tokens of a text: the tokenizer and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}  # of a call
    return _hash(content, tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template, version("transformers"))


def _hash(*parts: Any) -> str:
    return blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def write_tokenized(folder: Path, file: TokenizedFile) -> None:
    """Write ``file`` to the new folder ``folder``, all of it or nothing.

    Raises:
        DataError: the folder is there or cannot be written.
    """
    with boundary(f"{folder} cannot be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            write_samples(file.samples, temporary / SAMPLES)
            (temporary / TOKENIZED).write_bytes(file.report.encoded(indent=2))
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def open_tokenized(
    folder: Path, settings: SFTDataSettings, fingerprint: str, vocabulary: int | None, limit: int | None = None
) -> TokenizedFile:
    """Open a folder that `write_tokenized` wrote.

    Args:
        fingerprint: of the run's tokenizer.
        vocabulary: tokens that the model knows; None does not check that it knows those of the samples.
        limit: samples to use; None uses all.

    Raises:
        DataError: it is damaged, was made with another tokenizer, or has samples that are too long.
    """
    with boundary(f"{folder} is no folder of tokenised data"):
        report = read(folder / TOKENIZED, Report)
    if report.tokenizer not in ("", fingerprint):
        raise DataError(
            f"{folder} was tokenised with another tokenizer or chat template than this model's; tokenise the data again"
        )
    if vocabulary is not None and report.largest >= vocabulary:
        raise DataError(f"{folder}: token {report.largest} is beyond the model's vocabulary of {vocabulary}")
    if report.longest > settings.max_length:
        raise DataError(
            f"{folder} has samples of up to {report.longest} tokens, more than data.max_length={settings.max_length}; "
            "raise it, or tokenise the data again"
        )
    samples = MappedSamples(folder / SAMPLES, limit)
    if len(samples) != (report.samples if limit is None else min(limit, report.samples)):
        raise DataError(f"{folder / SAMPLES} is damaged: {TOKENIZED} names another number of samples")
    return TokenizedFile(samples, report)


def cached(
    file: str,
    settings: SFTDataSettings,
    fingerprint: str,
    vocabulary: int | None,
    tokenise: Callable[[], TokenizedFile],
) -> TokenizedFile:
    """Return the samples of ``file`` from the cache, after writing them there if they are not; from ``tokenise`` if
    ``settings.cache_dir`` says that the file is not cached.
    """
    folder = _cache_folder(file, settings, fingerprint)
    if folder is None:
        return tokenise()
    with _locked(folder):
        if not is_tokenized(folder):
            write_tokenized(folder, tokenise())
        found = open_tokenized(folder, settings, fingerprint, vocabulary)
    return replace(found, report=found.report.model_copy(update={"notes": [*found.report.notes, f"kept in {folder}"]}))


def _cache_folder(file: str, settings: SFTDataSettings, fingerprint: str) -> Path | None:
    """Return where the samples of ``file`` are kept; None if they are not."""
    if settings.cache_dir is None:
        return None
    identity, size = _identity(file)
    if settings.cache_dir == AUTO:
        if size < CACHED_BYTES:
            return None
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlcore" / "tokenized"
    else:
        root = Path(settings.cache_dir)
    chosen = settings.model_dump(mode="json", exclude=_NOT_READ)
    return root / _hash(identity, fingerprint, chosen, version("rlcore-recipes"), Report.model_fields["format"].default)


def _identity(file: str) -> tuple[Any, int]:
    """Return what changes with the contents of a data file, and its size in bytes."""
    if (hub := HUB.fullmatch(file)) is not None:
        dataset = open_hub(hub["name"], hub["config"], hub["split"] or "train")
        return (file, dataset._fingerprint), dataset.data.nbytes
    path = existing_file(file).resolve()
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    return (str(path), stats), sum(size for _, size, _ in stats)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write ``folder``; where files cannot be locked, several may do the work."""
    with boundary(f"the cache of tokenised data {folder.parent} cannot be written (data.cache_dir names another)"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
