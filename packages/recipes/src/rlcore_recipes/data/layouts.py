"""Which columns of a file hold what: as the settings say or, where they say `AUTO`, by the names that are in use.

verl's files have ``reward_model.ground_truth``; TRL's have ``prompt`` and columns of any name for the reward, and for
SFT ``messages``, ``prompt`` and ``completion``, or ``text``. A name is recognised only if a single one fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rlcore.errors import DataError
from rlcore_recipes.data.columns import Columns
from rlcore_recipes.data.pretokenized import ATTENTION, POSITIONS, mask_column
from rlcore_recipes.data.settings import (
    AUTO,
    DataFiles,
    DataSettings,
    PairDataSettings,
    PreferenceDataSettings,
    RewardDataSettings,
    SFTDataSettings,
)
from rlcore_recipes.data.template_variables import RENDERED

Choose = Callable[[Sequence[str], str], Columns]
"""Returns the columns that are read of a file. Arguments: the names of its columns and of fields of structs; the file.

Raises:
    DataError: a column that is needed is missing, or several could be meant.
"""

PROMPT, TRUTH, SOURCE = "data.prompt_key", "data.ground_truth_key", "data.data_source_key"
MESSAGES, RESPONSE, TEXT = "data.messages_key", "data.response_key", "data.text_key"
INPUT_IDS, LOSS_MASK = "data.input_ids_key", "column of what is learned"

CHOSEN, REJECTED, MARGIN = "data.chosen_key", "data.rejected_key", "data.margin_key"
COMPLETION, LABEL = "data.completion_key", "data.label_key"
STEPS, STEP_LABELS = "data.steps_key", "data.step_labels_key"

TRUTHS = ("ground_truth", "reward_model.ground_truth")
"""Columns that hold the reference answer, ours and verl's. Where a file has both, they must agree."""

ANSWERS = ("answer", "solution", "label")
"""Columns that may hold the reference answer, in data sets made for TRL, verifiers and OpenRLHF."""

FORMATS = {
    "completion": "TRL's prompt-completion format",
    "chosen": "TRL's preference format",
    "rejected": "TRL's preference format",
}
"""Columns that reinforcement learning does not train on, and where they come from."""


def every_column(names: Sequence[str], file: str) -> Columns:
    """Choose all columns."""
    return Columns()


def prompt_columns(settings: DataSettings) -> Choose:
    """Return what chooses the columns of prompts for reinforcement learning."""

    def choose(names: Sequence[str], file: str) -> Columns:
        if {"chosen", "rejected"} <= {*names} and settings.prompt_key not in names:
            raise DataError(
                f"{file} is a preference data set without prompts ({', '.join(names)}); reinforcement learning samples "
                f"answers to prompts: add a column with them, and name it in {PROMPT}"
            )
        truth, same, notes = _truth(settings.ground_truth_key, names)
        source, more = _source(settings.data_source_key, names)
        unused = [f"{name!r} ({FORMATS[name]})" for name in FORMATS if name in names]
        if unused:
            more.append(f"{', '.join(unused)}: not trained on, reaches the reward")
        if rendered := [repr(name) for name in RENDERED if name in names]:
            more.append(f"{', '.join(rendered)}: not given to the chat template, reaches the reward")
        keys = {PROMPT: settings.prompt_key, TRUTH: truth, SOURCE: source}
        columns = Columns(keys, same=same, notes=(*notes, *more))
        columns.require(names, file)
        return columns

    return choose


def _truth(key: str | None, names: Sequence[str]) -> tuple[str | None, tuple[str, ...], list[str]]:
    """Return the column of the reference answer, columns that hold the same, and what to tell the user."""
    if key != AUTO:
        return key, (), []
    if exact := [name for name in TRUTHS if name in names]:
        notes = [f"ground truth from {exact[0]!r} (verl's layout)"] if exact[0] != TRUTHS[0] else []
        return exact[0], tuple(exact[1:]), notes
    # TRL's unpaired preferences have a label that says whether the completion is good
    found = [name for name in ANSWERS if name in names and not (name == "label" and "completion" in names)]
    if len(found) == 1:
        return found[0], (), [f"ground truth from {found[0]!r}"]
    why = f"{' and '.join(map(repr, found))} could be it" if found else f"no column {', '.join((*TRUTHS, *ANSWERS))}"
    return None, (), [f"no ground truth: {why} ({TRUTH} names it)"]


def _source(key: str | None, names: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the column of the data source, and what to tell the user."""
    if key != AUTO:
        return key, []
    if "data_source" in names:
        return "data_source", []
    if "task" in names and {"answer", "info"} & {*names}:
        return "task", ["data source from 'task' (verifiers' layout)"]
    return None, []


def sft_columns(settings: SFTDataSettings) -> Choose:
    """Return what chooses the columns of samples to learn."""

    def choose(names: Sequence[str], file: str) -> Columns:
        samples = _samples(settings, names, file)
        if INPUT_IDS in samples:
            more = {
                LOSS_MASK: mask_column(names, file),
                **{name: name for name in (ATTENTION, POSITIONS) if name in names},
            }
        else:
            more = {name: name for name in RENDERED if name in names and TEXT not in samples}
        return _only({**samples, **more}, settings, names, file)

    return choose


def pair_columns(settings: PairDataSettings) -> Choose:
    """Return what chooses the columns of preference pairs."""

    def choose(names: Sequence[str], file: str) -> Columns:
        without_pairs = settings.chosen_key not in names and settings.rejected_key not in names
        if without_pairs and isinstance(settings, RewardDataSettings) and {"label", "labels", "score"} & {*names}:
            raise DataError(
                f"{file} has answers with labels ({', '.join(names)}) and no pairs; actor.objective.loss=bce (or mse) "
                "learns from them"
            )
        if without_pairs and "label" in names:
            raise DataError(
                f"{file} has single answers with labels ({', '.join(names)}) and no pairs; rlcore run dpo with "
                "actor.objective.loss=kto learns from them"
            )
        with_prompt = (
            settings.prompt_key in names or settings.prompt_key != PairDataSettings.model_fields["prompt_key"].default
        )
        margin = settings.margin_key
        keys = {
            PROMPT: settings.prompt_key if with_prompt else None,
            CHOSEN: settings.chosen_key,
            REJECTED: settings.rejected_key,
            MARGIN: ("margin" if "margin" in names else None) if margin == AUTO else margin,
        }
        return _only(keys, settings, names, file)

    return choose


def labelled_columns(settings: PreferenceDataSettings) -> Choose:
    """Return what chooses the columns of single answers with labels, or of pairs in a file that has no labels."""

    def choose(names: Sequence[str], file: str) -> Columns:
        if settings.label_key not in names and {settings.chosen_key, settings.rejected_key} <= {*names}:
            columns = pair_columns(settings)(names, file)
            return replace(columns, notes=(*columns.notes, "a pair is taken for a good and a bad answer"))
        completion = settings.completion_key
        if completion == AUTO:
            completion = next((name for name in ("completion", "response") if name in names), "completion")
        keys: dict[str, str | None] = {PROMPT: settings.prompt_key, COMPLETION: completion, LABEL: settings.label_key}
        return _only(keys, settings, names, file)

    return choose


def scored_columns(settings: RewardDataSettings) -> Choose:
    """Return what chooses the columns of answers with labels: of steps, or of whole answers."""

    def choose(names: Sequence[str], file: str) -> Columns:
        with_labels = settings.step_labels_key in names
        labels = {"label", "score", *settings.label_key, settings.step_labels_key}
        if not labels & {*names} and {settings.chosen_key, settings.rejected_key} <= {*names}:
            raise DataError(
                f"{file} has pairs of answers ({', '.join(names)}) and no labels; actor.objective.loss=bradley_terry "
                "learns from them"
            )
        steps = ("completions" if with_labels else None) if settings.steps_key == AUTO else settings.steps_key
        keys: dict[str, str | None] = {PROMPT: settings.prompt_key}
        if steps is not None:
            return _only({**keys, STEPS: steps, STEP_LABELS: settings.step_labels_key}, settings, names, file)
        response, label_keys = settings.response_key, settings.label_key
        if response == AUTO:
            response = next((name for name in ("response", "completion") if name in names), "response")
        if label_keys == [AUTO]:
            label_keys = [next((name for name in ("label", "score") if name in names), "label")]
        found = {label_place(number): name for number, name in enumerate(label_keys)}
        return _only({**keys, RESPONSE: response, **found}, settings, names, file)

    return choose


def label_place(number: int) -> str:
    """Return what `Columns.keys` has for the column of the labels of an output: the key, with its place in it."""
    return f"{LABEL}[{number}]" if number else LABEL


def _only(keys: dict[str, str | None], settings: DataFiles, names: Sequence[str], file: str) -> Columns:
    """Return the columns ``keys`` and that of the data source, no others; notes say which are not read."""
    source, notes = _source(settings.data_source_key, names)
    columns = Columns({**keys, SOURCE: source}, others=False)
    columns.require(names, file)
    whole = [name for name in names if "." not in name]
    if unread := sorted({*whole} - {*columns.chosen(whole)}):
        notes.append(f"not read: {', '.join(unread)}")
    return replace(columns, notes=tuple(notes))


def _samples(settings: SFTDataSettings, names: Sequence[str], file: str) -> dict[str, str | None]:
    """Return the columns of samples by the keys that name them: whole conversations, text, or prompt and response."""
    named = {
        MESSAGES: settings.messages_key,
        RESPONSE: settings.response_key,
        TEXT: settings.text_key,
        INPUT_IDS: settings.input_ids_key,
    }
    chosen = [(key, name) for key, name in named.items() if name not in (AUTO, None)]
    if not chosen:
        found = [
            *([(INPUT_IDS, "input_ids")] if settings.input_ids_key == AUTO and "input_ids" in names else []),
            *([(MESSAGES, "messages")] if settings.messages_key == AUTO and "messages" in names else []),
            *((RESPONSE, name) for name in ("response", "completion") if name in names),
        ]
        with_prompt = settings.prompt_key in names
        found = [(key, name) for key, name in found if key != RESPONSE or with_prompt]
        if not found and settings.text_key == AUTO and "text" in names:
            found = [(TEXT, "text")]
        if len(found) > 1:
            raise DataError(
                f"{file} has several columns to learn from, {' and '.join(repr(name) for _, name in found)}; set "
                f"{' or '.join(f'{key}={name}' for key, name in found)}"
            )
        chosen = found or [_missing(names, file, with_prompt)]
    [(key, name)] = chosen
    return {key: name} if key != RESPONSE else {PROMPT: settings.prompt_key, key: name}


def _missing(names: Sequence[str], file: str, with_prompt: bool) -> tuple[str, str]:
    """Return the default column, whose absence is an error.

    Raises:
        DataError: the file has a format from which nothing can be learned without a decision of the user.
    """
    if "chosen" in names:
        how = f"{RESPONSE}=chosen" if with_prompt else f"{MESSAGES}=chosen (conversations) or {TEXT}=chosen (text)"
        raise DataError(f"{file} has preferences ({', '.join(names)}); to learn the chosen answers alone, set {how}")
    return RESPONSE, "response"
