"""Small models from scratch: a tokenizer trained on a data set and a randomly initialised Qwen2 of any size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from rlcore.config import Config
from rlcore.errors import DataError

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class SmallModelSettings(Config):
    """Size of a Qwen2 model; the defaults have about 0.8 million parameters and train on a laptop."""

    vocab_size: int = Field(
        512, ge=300, le=2**20, description="Maximum tokens the tokenizer learns; it may find fewer."
    )
    hidden_size: int = Field(128, gt=0, le=2**15, description="Width of the model.")
    layers: int = Field(3, gt=0, le=2**10, description="Decoder layers.")
    heads: int = Field(4, gt=0, le=2**10, description="Attention heads.")
    kv_heads: int = Field(2, gt=0, le=2**10, description="Key-value heads.")
    intermediate_size: int = Field(384, gt=0, le=2**17, description="Width of the feed-forward layers.")
    max_position_embeddings: int = Field(2048, gt=0, description="Maximum length of a sequence in tokens.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the initial weights.")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE, which splits numbers into digits, with merges learned from ``texts`` and a chat template.

    It is that very class because transformers picks a tokenizer's class by the type of the model in its folder.
    """
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(eos_token=END, pad_token=PAD, unk_token=None)  # type: ignore[arg-type]
    trained: Qwen2Tokenizer = blank.train_new_from_iterator(
        texts, vocab_size, new_special_tokens=[USER, ASSISTANT, SYSTEM], show_progress=False
    )
    trained.chat_template = CHAT_TEMPLATE
    return trained


def write_small_model(out: Path, texts: Iterable[str], settings: SmallModelSettings) -> int:
    """Train a tokenizer on ``texts``, initialise a Qwen2 model, write both to ``out``.

    Returns:
        the number of parameters.

    Raises:
        DataError: ``out`` exists and is not empty; nothing is written then.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; choose another folder for the new model")
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Qwen2ForCausalLM(config)
    logging.disable_progress_bar()  # a bar for one small file
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())
