"""`retrieval`: the passages of a local corpus that fit a query best, by BM25."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import ConfigError
from rlcore_agents.tools.function import function_tool
from rlcore_agents.tools.tool import Tool

MAX_RESULTS = 20


def retrieval_tool(corpus: Path, column: str, results: int, max_characters: int) -> Tool:
    """Index ``corpus`` and return the tool that searches it.

    Args:
        corpus: a JSONL or Parquet file with the passages in ``column``, or a folder of text files, one passage each.
        results: passages of an answer, unless the policy asks for another number.

    Raises:
        ConfigError: the corpus cannot be read, or is empty.
    """
    import bm25s  # type: ignore[import-untyped]

    passages = read_corpus(corpus, column)
    with boundary(f"{corpus} cannot be indexed", ConfigError):
        index = bm25s.BM25()
        index.index(bm25s.tokenize(passages, show_progress=False), show_progress=False)

    def search(query: str, results: int = results) -> str:
        """Search the corpus and return the passages that fit the query best."""
        wanted = min(max(results, 1), MAX_RESULTS, len(passages))
        terms = bm25s.tokenize(query, show_progress=False)
        found, scores = index.retrieve(terms, k=wanted, show_progress=False)
        best = [passages[number] for number, score in zip(found[0], scores[0], strict=True) if score > 0]
        return "\n\n".join(f"[{rank}] {passage}" for rank, passage in enumerate(best, 1)) or "Nothing was found."

    return function_tool(search, name="search", max_characters=max_characters)


def read_corpus(corpus: Path, column: str) -> list[str]:
    """Return the passages of a corpus, in order; empty ones are left out.

    Raises:
        ConfigError: it does not exist, cannot be read, or has no passage.
    """
    if not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    with boundary(f"corpus {corpus} cannot be read", ConfigError):
        passages = [text.strip() for text in _passages(corpus, column)]
    passages = [passage for passage in passages if passage]
    if not passages:
        raise ConfigError(f"corpus {corpus} holds no text")
    return passages


def _passages(corpus: Path, column: str) -> Iterator[str]:
    if corpus.is_dir():
        for file in sorted(path for path in corpus.rglob("*") if path.suffix in (".txt", ".md") and path.is_file()):
            yield file.read_text(encoding="utf-8")
    elif corpus.suffix == ".parquet":
        yield from _of_parquet(corpus, column)
    elif corpus.suffix in (".jsonl", ".json"):
        with corpus.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(json.loads(line), column, f"line {number}")
    else:
        raise ConfigError(f"corpus {corpus} is neither a .jsonl or .parquet file nor a folder of .txt or .md files")


def _of_parquet(corpus: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("a corpus in Parquet needs pyarrow; run: pip install pyarrow") from None
    file = parquet.ParquetFile(corpus)
    if column not in file.schema_arrow.names:
        raise ConfigError(f"corpus {corpus} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
    number = 0
    for batch in file.iter_batches(columns=[column]):
        for row in batch.to_pylist():
            number += 1
            yield _text_of(row, column, f"row {number}")


def _text_of(row: Any, column: str, where: str) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        has = f"it has {', '.join(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise ConfigError(f"{where} of the corpus has no text {column!r}; {has}")
    return text
