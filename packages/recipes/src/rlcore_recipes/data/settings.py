"""The section ``data`` of a recipe's configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlcore.config import Config, FileName

TEMPLATE_ARGUMENTS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
"""Arguments of a chat template's call that decide what it returns; data.chat_template_kwargs may not set them."""

AUTO = "auto"
"""A key of a column that is found by the names in use (`rlcore_recipes.data.layouts`)."""


class DataFiles(Config):
    """Where samples come from and in which order they are used."""

    train_files: list[FileName] = Field(
        min_length=1,
        description="Parquet, JSONL, JSON, CSV or Arrow files, folders of Dataset.save_to_disk, or Hub data sets as "
        "'hub:org/name[:config][@split]'; one or several.",
    )
    val_files: list[FileName] = Field([], description="Files to validate on, as train_files; none validates nothing.")
    train_batch_size: int = Field(256, ge=1, description="Prompts (or SFT samples) per step.")
    val_batch_size: int | None = Field(None, ge=1, description="Prompts per validation batch; null: all together.")
    val_limit: int | None = Field(None, ge=1, description="Validate on the first rows of the val files only.")
    shuffle: bool = Field(True, description="Use the samples of every epoch in a new order, determined by the seed.")
    weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Share of each train file in an epoch, one number per file; null goes by its rows."
    )
    prompt_key: str = Field(
        "prompt", description="Column of the prompt: chat messages or text. Dots reach into structs."
    )
    data_source_key: str | None = Field(
        AUTO,
        description="Column that names the data set of a row; null uses the file's name. auto: data_source, where a "
        "file has it.",
    )
    system_prompt: str | None = Field(
        None, description="System message for conversations without one; precedes a plain-text prompt."
    )
    apply_chat_template: Literal["auto", "always", "never"] = Field(
        "auto",
        description="auto: the tokenizer's chat template for messages, plain text as it is; always: plain text as a "
        "user message; never: the messages' text alone.",
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="Extra variables for the chat template.")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.weights is not None and len(self.weights) != len(self.train_files):
            yield (
                "weights",
                f"has {len(self.weights)} numbers for the {len(self.train_files)} train_files: one is needed per file",
            )
        for name in TEMPLATE_ARGUMENTS:
            if name in self.chat_template_kwargs:
                yield (
                    f"chat_template_kwargs.{name}",
                    "is set by rlcore; give variables that the tokenizer's own template knows",
                )
        for field in ("train_files", "val_files"):
            for file, count in Counter(getattr(self, field)).items():
                if count > 1:
                    yield field, f"names {file} {count} times; set weights to use a file more often"


class DataSettings(DataFiles):
    """Prompts for reinforcement learning."""

    ground_truth_key: str | None = Field(
        AUTO,
        description="Column of the reference answer; null for none. auto: ground_truth, verl's "
        "reward_model.ground_truth, or the only one of answer, solution and label.",
    )
    max_prompt_length: int = Field(512, ge=1, description="Maximum length of a prompt, in tokens.")
    max_response_length: int = Field(512, ge=1, description="Maximum length of a completion, in tokens.")
    overlong_prompts: Literal["filter", "error", "left", "right", "middle"] = Field(
        "filter",
        description="What to do with prompts longer than max_prompt_length: leave them out, stop, or cut tokens off at "
        "the left, at the right or in the middle.",
    )

    @property
    def longest_sequence(self) -> int:
        """Maximum tokens of a prompt and its completion."""
        return self.max_prompt_length + self.max_response_length


class SampleDataSettings(DataFiles):
    """Samples to learn from without rollouts.

    Attributes:
        rows_per_sample: rows of a batch that a sample becomes; a pair is two.
    """

    rows_per_sample: ClassVar[int] = 1

    max_length: int = Field(1024, ge=2, description="Maximum length of a sample, prompt included, in tokens.")
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Share of each data source in an epoch, by its name; null goes by rows, or by weights."
    )
    overlong: Literal["filter", "truncate", "error"] = Field(
        "filter", description="What to do with longer samples: leave them out, cut their end off, or stop."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.mix is not None and self.weights is not None:
            yield "mix", "cannot be set together with weights: shares are those of sources or of files"


class SFTDataSettings(SampleDataSettings):
    """Conversations, or prompts with responses, for supervised fine-tuning."""

    messages_key: str | None = Field(
        AUTO,
        description="Column of whole conversations, trained on every assistant turn; null for none. auto: messages.",
    )
    response_key: str = Field(
        AUTO,
        description="Column of what to learn after the prompt: text, or chat messages. auto: response or completion.",
    )
    text_key: str | None = Field(
        AUTO, description="Column of plain text, all of which is learned; null for none. auto: text."
    )
    input_ids_key: str | None = Field(
        AUTO,
        description="Column of token ids, with labels or loss_mask of the same length next to it; null for none. auto: "
        "input_ids.",
    )
    cache_dir: FileName | None = Field(
        AUTO,
        description="Folder that keeps tokenised samples for the next start; null keeps none. auto: "
        "~/.cache/rlcore/tokenized, for files of 32 MiB or more.",
    )
    learn: Literal["answers", "last_answer", "everything"] = Field(
        "answers",
        description="What is learned of conversations and of prompts with responses: every assistant turn (or the "
        "response), the last assistant turn alone, or the prompts too.",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        named = [
            key
            for key in ("messages_key", "response_key", "text_key", "input_ids_key")
            if getattr(self, key) not in (AUTO, None)
        ]
        if len(named) > 1:
            yield named[1], f"cannot be set together with {named[0]}: a sample is read from one of them"


class PairDataSettings(SampleDataSettings):
    """Preference pairs: two answers to a prompt, of which one is preferred."""

    rows_per_sample: ClassVar[int] = 2

    max_length: int = Field(1024, ge=2, description="Maximum length of either side, prompt included, in tokens.")
    overlong: Literal["filter", "truncate", "error"] = Field(
        "filter",
        description="What to do with pairs of which a side is longer: leave them out, cut the end of that side off, or "
        "stop.",
    )
    prompt_key: str = Field(
        "prompt",
        description="Column of the prompt: chat messages or text. Without such a column, the prompt is what both sides "
        "begin with.",
    )
    chosen_key: str = Field("chosen", description="Column of the preferred answer: text, or chat messages.")
    rejected_key: str = Field("rejected", description="Column of the other answer, in the same form.")
    margin_key: str | None = Field(
        AUTO,
        description="Column of a number: by how much the chosen answer is better; null for none. auto: margin, where "
        "a file has it.",
    )
    unusable: Literal["filter", "error"] = Field(
        "filter",
        description="What to do with pairs that have an empty side, equal sides, or prompts that differ: count them "
        "and leave them out, or stop.",
    )


class PreferenceDataSettings(PairDataSettings):
    """Preferences: pairs of answers, or single answers with a label, as the loss needs them."""

    margin_key: str | None = Field(
        None, description="Column of a number, for losses that read it: by how much the chosen answer is better."
    )
    completion_key: str = Field(
        AUTO,
        description="Column of a single answer, for losses without pairs: text, or chat messages. auto: completion or "
        "response.",
    )
    label_key: str = Field(
        "label", description="Column that says whether a single answer is good: true or false, or 1 and 0."
    )


class RewardDataSettings(PairDataSettings):
    """Preference pairs, or answers with labels, for reward models: as the loss needs them."""

    train_batch_size: int = Field(256, ge=1, description="Pairs, or answers with labels, per step.")
    val_batch_size: int | None = Field(
        None, ge=1, description="Pairs, or answers, per validation batch; null: all together."
    )
    response_key: str = Field(
        AUTO,
        description="Column of an answer that has a label: text, or chat messages. auto: response or completion.",
    )
    label_key: list[str] = Field(
        [AUTO],
        min_length=1,
        description="Column of an answer's label: true or false, or a number. auto: label or score. Several columns "
        "train a model with as many outputs, which have their names.",
    )
    steps_key: str | None = Field(
        AUTO,
        description="Column of the steps of an answer, a list of texts; null: answers have one label. auto: "
        "completions, where a file has the labels of steps.",
    )
    step_labels_key: str = Field(
        "labels", description="Column of the labels of steps: a list with true or false, a number, or null for none."
    )
    step_separator: str = Field("\n\n", min_length=1, description="Text between two steps.")
