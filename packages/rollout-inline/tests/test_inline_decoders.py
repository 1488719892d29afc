"""The decoders of the inline rollout against transformers' own `generate`, architecture by architecture."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from rlcore.engines import GenerationRequest, ModelSettings, RolloutSpec, SamplingParams
from rlcore.errors import EngineError
from rlcore_inline import direct
from rlcore_inline.direct import DirectDecoder
from rlcore_inline.engine import InlineRollout, build
from rlcore_inline.generic import GenericDecoder
from rlcore_inline.settings import InlineSettings
from rlcore_inline.verification import deviation

NEW_TOKENS = 24
CPU = torch.device("cpu")

# name -> (architecture, configuration, whether the direct decoder serves it)
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, True),
    "llama3-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        True,
    ),
    "llama-wide-heads": ("Llama", {"head_dim": 16}, True),
    "mistral": ("Mistral", {"sliding_window": None}, True),
    "mistral-window": ("Mistral", {"sliding_window": 9}, True),
    "qwen2": ("Qwen2", {}, True),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, True),
    "qwen3": ("Qwen3", {"head_dim": 16}, True),
    "llama-dynamic-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        False,
    ),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 10, "query_pre_attn_scalar": 24}, False),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        False,
    ),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}, False),
    "gpt-neox": ("GPTNeoX", {}, False),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, False),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
        False,
    ),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        False,
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
        False,
    ),
}
DIRECT = [name for name, (_, _, served) in MODELS.items() if served]


class Source:
    dp_rank, dp_size, device, step_count = 0, 1, CPU, 0

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def generation_weights(self):
        return nullcontext(self.model)


def load(name: str) -> PreTrainedModel:
    """A random model with larger weights than usual, so that every term of it shows in the logits."""
    architecture, overrides, _ = MODELS[name]
    config = getattr(transformers, f"{architecture}Config")(
        **{
            "vocab_size": 261,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            **overrides,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def rollout(model: PreTrainedModel, **settings: Any) -> InlineRollout:
    return build(RolloutSpec(ModelSettings(path="none"), InlineSettings(**settings), 256, train_engine=Source(model)))


@pytest.mark.parametrize(
    ("name", "decoder"), [*((name, "generic") for name in MODELS), *((name, "direct") for name in DIRECT)]
)
def test_greedy_completions_equal_those_of_transformers(name: str, decoder: str) -> None:
    model = load(name)
    prompts = [[(11 * i + 3 * j) % 250 + 5 for j in range(length)] for i, length in enumerate((1, 3, 14, 40))]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    engine = rollout(model, decoder=decoder)
    completions = engine.generate_batch([GenerationRequest(prompt, sampling) for prompt in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        assert completion.tokens == whole[0, len(prompt) :].tolist()
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, whole[0, len(prompt) :, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_chosen(name: str) -> None:
    model = load(name)
    engine = rollout(model)
    engine.wake()
    expected = DirectDecoder if MODELS[name][2] else GenericDecoder
    assert type(engine._decoder) is expected
    if expected is GenericDecoder:
        with pytest.raises(EngineError, match="set decoder to 'auto' or 'generic'"):
            rollout(model, decoder="direct").wake()


def test_derived_and_adapted_models_are_not_taken_for_known_ones() -> None:
    model = load("llama")
    assert direct.unsupported_reason(model) is None

    class Projection(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    attention = model.model.layers[1].self_attn
    attention.v_proj.__class__ = Projection
    assert (
        direct.unsupported_reason(model) == "model.layers.1.self_attn.v_proj is a Projection, not a plain linear layer"
    )
    model.model.layers[1].self_attn.v_proj.__class__ = torch.nn.Linear
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "my_package"})
    assert "is not one of" in str(direct.unsupported_reason(model))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "gemma2"])
def test_verification_accepts_what_is_right(name: str) -> None:
    model = load(name)
    assert deviation(model, GenericDecoder(model), CPU) < 1e-4
    if name in DIRECT:
        assert deviation(model, DirectDecoder(model), CPU) < 1e-4


def test_verification_refuses_what_is_wrong() -> None:
    """A model with a term that the decoder does not know, and one that ignores the attention interface."""
    model = load("llama")
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: plain(hidden) + hidden
    with pytest.raises(EngineError, match="deviate"):
        rollout(model, decoder="direct").wake()
    assert len(rollout(model, decoder="generic").generate_batch([GenerationRequest([5], SamplingParams(3))])) == 1


def test_models_without_a_key_value_cache_are_refused() -> None:
    config = transformers.MambaConfig(vocab_size=261, hidden_size=32, state_size=4, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(EngineError, match="cannot generate with MambaForCausalLM"):
        rollout(model).wake()


def test_low_precision() -> None:
    """In bfloat16 log-probs stay within what its eight bits of mantissa allow."""
    model = load("qwen2").bfloat16()
    for decoder in ("direct", "generic"):
        request = GenerationRequest([5, 6, 7], SamplingParams(max_tokens=30, seed=1, ignore_eos=True))
        (completion,) = rollout(model, decoder=decoder).generate_batch([request])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5, 6, 7, *completion.tokens]])).logits[0, 2:-1].float()
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=0.3)


class OwnModel(transformers.LlamaForCausalLM):
    """A custom architecture that knows only what it needs to; without ``logits_to_keep``, and with scaled logits."""

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=None):  # type: ignore[override]
        outputs = self.model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache
        )
        return CausalLMOutputWithPast(logits=self.lm_head(outputs.last_hidden_state) * 1.5)


def test_custom_architectures() -> None:
    model = load("llama")
    model.__class__ = OwnModel
    request = GenerationRequest([5, 6, 7], SamplingParams(max_tokens=30, seed=1, ignore_eos=True))
    engine = rollout(model)
    (completion,) = engine.generate_batch([request])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, *completion.tokens]])).logits[0, 2:-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
