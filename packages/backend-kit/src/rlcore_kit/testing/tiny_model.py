"""Tiny random models and tokenizers in Hugging Face format, for tests that need a model folder without network."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def tiny_tokenizer() -> Any:
    """Make a byte-level tokenizer (no merges) with a chat template; pad is 0, end of sequence is 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers: Any = import_module("transformers")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    path: str | Path,
    *,
    architecture: str = "Qwen2",
    head: Literal["policy", "score"] = "policy",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a random model and its tokenizer to ``path`` and return it.

    Args:
        architecture: prefix of a transformers causal LM's classes, e.g. "Qwen2", "Qwen3", "Llama", "Mistral".
        head: "score" writes a reward model.
        overrides: configuration fields; the defaults give 2 layers of width 32 with 4 heads over 2 key-value heads.
    """
    transformers: Any = import_module("transformers")
    logging = transformers.utils.logging
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        **overrides,
    }
    if head == "score":
        settings["num_labels"] = 1
    config = getattr(transformers, f"{architecture}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = "CausalLM" if head == "policy" else "SequenceClassification"
        model = getattr(transformers, f"{architecture}For{kind}")(config)
        # transformers initialises the padding token with zeros, where the gradient of a normalisation is enormous
        padding = model.get_input_embeddings().weight.data[tokenizer.pad_token_id]
        padding.normal_(std=config.initializer_range)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(path)
    if bars:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(path)
    return Path(path)
