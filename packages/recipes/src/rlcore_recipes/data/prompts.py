"""Prompts for reinforcement learning, tokenised and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from rlcore.engines.episode import PromptSample
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt
from rlcore_recipes.data.columns import Columns, Row, column, data_source
from rlcore_recipes.data.encoding import as_answer, encode_answers
from rlcore_recipes.data.end_tokens import check_tokens, written_ends
from rlcore_recipes.data.files import DataFile, Fingerprint, open_files
from rlcore_recipes.data.layouts import PROMPT, SOURCE, TRUTH, prompt_columns
from rlcore_recipes.data.overlong import Lengths, cut_to
from rlcore_recipes.data.sample_store import SampleStore
from rlcore_recipes.data.settings import AUTO, DataSettings

Prompt = str | list[Message]


@dataclass(frozen=True)
class PromptDataset(Sequence[PromptSample]):
    """Prompts of one or several files, in order.

    Attributes:
        file_sizes: prompts per file, without the filtered ones.
        filtered: over-long prompts left out.
        cut: over-long prompts of which tokens were cut off.
        fingerprints: of what each file holds.
        ends: tokens that end an answer in texts of the tokenizer (see `written_ends`).
        notes: what was recognised in the files.
        long_responses: prompts left out because their responses are too long.
        without_truth: a file in which ``data.ground_truth_key=auto`` found no reference answer, and why.
    """

    samples: Sequence[PromptSample]
    file_sizes: list[int]
    filtered: int = 0
    cut: int = 0
    fingerprints: Sequence[str] = ()
    ends: frozenset[int] = frozenset()
    notes: Sequence[str] = ()
    without_truth: str | None = None
    long_responses: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> PromptSample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PromptSample]: ...
    def __getitem__(self, index: int | slice) -> PromptSample | Sequence[PromptSample]:
        return self.samples[index]


def load_prompts(
    settings: DataSettings,
    files: Sequence[str],
    tokenizer: Any,
    limit: int | None = None,
    vocabulary: int | None = None,
    response_key: str | None = None,
) -> PromptDataset:
    """Read and tokenise prompts.

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        tokenizer: see `rlcore_recipes.data.tokenizer.load_tokenizer`.
        limit: read only the first rows of all files together (``settings.val_limit``).
        vocabulary: tokens that the model knows; None does not check that it knows those of the prompts.
        response_key: column with the responses that are trained on; None reads none.

    Raises:
        DataError: a file or column is missing or cannot be read, a prompt is null or empty, holds something else than
            text or a token that the model does not know, the chat template is missing or fails, a prompt is too long
            under ``overlong_prompts=error``, or no prompt of a file is short enough.
    """
    reader = _Reader(settings, Renderer(settings, tokenizer), vocabulary, response_key)
    samples: SampleStore[PromptSample] = SampleStore()
    sizes: list[int] = []
    prints: list[str] = []
    notes: list[str] = []
    without_truth = None
    for file in open_files(files, prompt_columns(settings), limit):
        before = len(samples)
        prints.append(reader.read(file, samples))
        sizes.append(len(samples) - before)
        notes += [f"{file.name}: {note}" for note in file.columns.notes]
        if settings.ground_truth_key == AUTO and file.columns.keys[TRUTH] is None:
            without_truth = f"{file.name}: {file.columns.notes[0]}"
    return PromptDataset(
        samples,
        sizes,
        filtered=reader.filtered,
        cut=reader.cut,
        fingerprints=prints,
        ends=written_ends(reader.renderer, reader.chat),
        notes=notes,
        without_truth=without_truth,
        long_responses=reader.long_responses,
    )


@dataclass
class _Reader:
    """Makes samples of files.

    Attributes:
        chat: whether the chat template was used.
        filtered: prompts left out so far, because they are too long.
        cut: prompts cut so far.
    """

    settings: DataSettings
    renderer: Renderer
    vocabulary: int | None
    response_key: str | None = None
    chat: bool = False
    filtered: int = 0
    cut: int = 0
    long_responses: int = 0

    def read(self, file: DataFile, samples: SampleStore[PromptSample]) -> str:
        """Append the prompts of ``file`` that are not too long to ``samples``; return the file's fingerprint."""
        seen, fingerprint = Lengths(), Fingerprint(file.name)
        for rows in file.chunks:
            fingerprint.add(rows)
            places = [f"{file.name}, row {number}" for number in range(seen.rows, seen.rows + len(rows))]
            tokens, prompts = self._tokens(file, rows, places)
            kept = seen.add(tokens, self.settings)
            completions = self._completions(file, rows, places, prompts, tokens)
            short = [n for n in kept if len(completions[n] or ()) <= self.settings.max_response_length]
            self.long_responses += len(kept) - len(short)
            samples.extend(
                replace(
                    self._sample(file, rows[number], places[number], prompts[number], tokens[number], index),
                    completion=completions[number],
                )
                for index, number in enumerate(short, len(samples))
            )
        seen.check(self.settings, file.name)
        if self.settings.overlong_prompts == "filter":
            self.filtered += seen.too_long
        else:
            self.cut += seen.too_long
        return fingerprint.hex()

    def _tokens(self, file: DataFile, rows: list[Row], places: list[str]) -> tuple[list[list[int]], list[Prompt]]:
        """Return the token ids of the rows' prompts, and the prompts."""
        key = self.settings.prompt_key
        prompts = [as_prompt(column(row, key), where, file.padded) for row, where in zip(rows, places)]
        tokens = self.renderer.prompt_tokens(prompts, places)
        for ids, where in zip(tokens, places):
            check_tokens(ids, self.vocabulary, self.renderer.tokenizer, where)
        self.chat = self.chat or any(map(self.renderer.is_chat, prompts))
        return tokens, prompts

    def _completions(
        self, file: DataFile, rows: list[Row], places: list[str], prompts: list[Prompt], tokens: list[list[int]]
    ) -> Sequence[list[int] | None]:
        """Return the token ids of the rows' responses, up to the end token; None each if none are read."""
        key = self.response_key
        if key is None:
            return [None] * len(rows)
        answers = []
        for row, where in zip(rows, places):
            value = column(row, key)
            if isinstance(value, list) and len(value) == 1:  # as `rlcore generate` writes completions
                value = value[0]
            if not isinstance(value, str):
                raise DataError(f"{where}: the column {key!r} must hold one response as text, not {value!r:.100}")
            answers.append(as_answer(value, where, file.padded))
        encoded = encode_answers(self.renderer, prompts, list(answers), places)
        found = []
        for (ids, mask), prompt, where in zip(encoded, tokens, places):
            if ids[: len(prompt)] != prompt:
                raise DataError(
                    f"{where}: with its response, the prompt has other tokens than without: the chat template writes "
                    "it differently; set data.chat_template_kwargs so that both agree"
                )
            found.append([token for token, learned in zip(ids[len(prompt) :], mask[len(prompt) :]) if learned])
            check_tokens(found[-1], self.vocabulary, self.renderer.tokenizer, where)
        return found

    def _sample(
        self, file: DataFile, row: Row, where: str, prompt: Prompt, tokens: list[int], index: int
    ) -> PromptSample:
        """Return the sample of a row; ``tokens`` are those of its prompt, which may be too long."""
        return PromptSample(
            prompt_tokens=cut_to(tokens, self.settings.max_prompt_length, self.settings.overlong_prompts),
            messages=self.renderer.messages(prompt),
            text=prompt if isinstance(prompt, str) and not self.renderer.is_chat(prompt) else None,
            ground_truth=_ground_truth(file.columns, row, where),
            data_source=data_source(row, file.columns.keys[SOURCE], where, Path(file.name).stem),
            extra=_extra(file.columns, row),
            index=index,
            position=index,
        )


def _ground_truth(columns: Columns, row: Row, where: str) -> Any:
    """Return the reference answer of a row.

    Raises:
        DataError: two columns hold different ones.
    """
    key = columns.keys[TRUTH]
    if key is None:
        return None
    value = column(row, key)
    for other in columns.same:
        if column(row, other) != value:
            raise DataError(
                f"{where}: the columns {key!r} and {other!r} hold different reference answers, {value!r:.100} and "
                f"{column(row, other)!r:.100}; set {TRUTH} to one of them"
            )
    return value


def _extra(columns: Columns, row: Row) -> dict[str, Any]:
    # a column of another name may be an argument of the reward function, too
    ours = {columns.keys[TRUTH], columns.keys[SOURCE]} & {"ground_truth", "data_source"}
    named = {columns.keys[PROMPT], *ours, "extra_info"}
    extra_info = row.get("extra_info")
    return {
        **{name: value for name, value in row.items() if name not in named},
        **(extra_info if isinstance(extra_info, dict) else {}),
    }
