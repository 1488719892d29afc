"""Every family's declaration compared with transformers: names, order, shapes, options; refused models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from rlcore.errors import EngineError
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_megatron import cpu_emulation
from rlcore_megatron.families import FAMILIES, Family, Weight, family_of
from rlcore_megatron.families.family import LM_HEAD
from rlcore_megatron.families.weight import Heads, share_shape, view
from rlcore_megatron.parallel import Parallel
from rlcore_megatron.weights import export, load_pretrained

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
}
SIZES = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(architecture: str, **overrides: Any) -> Any:
    known = ARCHITECTURES.get(architecture, {})
    return getattr(transformers, f"{architecture}Config")(**{**SIZES, **known, **overrides})


def names_as_written(model: transformers.PreTrainedModel) -> list[str]:
    """The model's tensors in its order, by the names under which ``save_pretrained`` writes each."""
    state = model.state_dict().items()
    return [name for key, tensor in state for name in revert_weight_conversion(model, {key: tensor})]


def test_every_family_is_declared() -> None:
    assert {config_of(architecture).model_type for architecture in ARCHITECTURES} == set(FAMILIES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_order_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path, architecture=architecture, **ARCHITECTURES[architecture], tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    names = [named.name for named in family_of(model.config).body(model.config)] + [LM_HEAD.hf]
    assert names == names_as_written(model)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert set(names) == set(file.keys())


def test_heads_of_a_group_are_interleaved() -> None:
    """Oracle: query group by query group, in plain loops."""
    groups, per_group, width, hidden = 3, 2, 4, 5
    query, key, value = (torch.randn(groups * count * width, hidden) for count in (per_group, 1, 1))
    rows = []
    for group in range(groups):
        rows += [query[(group * per_group + head) * width + row] for head in range(per_group) for row in range(width)]
        rows += [key[group * width + row] for row in range(width)]
        rows += [value[group * width + row] for row in range(width)]
    joint, heads = torch.stack(rows), Heads(per_group, width)
    for part, tensor in (("query", query), ("key", key), ("value", value)):
        assert share_shape(joint.shape, part, heads) == tensor.shape
        assert torch.equal(view(joint, part, heads).reshape(tensor.shape), tensor)


def test_gate_comes_before_up() -> None:
    gate, up = torch.randn(2, 6, 3)
    joint = torch.cat([gate, up])
    assert torch.equal(view(joint, "gate", Heads(1, 1)), gate)
    assert torch.equal(view(joint, "up", Heads(1, 1)), up)


@pytest.mark.parametrize(
    ("architecture", "overrides", "words"),
    [
        ("GPT2", {}, "does not support the architecture 'gpt2'.*qwen3_moe.*engine=fsdp"),
        ("Llama", {"attention_bias": True}, "attention_bias"),
        ("Llama", {"mlp_bias": True}, "mlp_bias"),
        ("Llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("Qwen3", {"attention_bias": True}, "attention_bias"),
        ("Mistral", {"sliding_window": 8}, "sliding-window"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window"),
        ("Mixtral", {"num_experts_per_tok": 1}, "one expert per token"),
        (
            "Qwen2",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'linear'",
        ),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "rope_theta": 1e4,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 256,
                }
            },
            "original_max_position_embeddings",
        ),
    ],
)
def test_a_model_that_megatron_computes_differently_is_refused(
    architecture: str, overrides: dict[str, Any], words: str
) -> None:
    sizes = {} if architecture == "GPT2" else SIZES
    config = getattr(transformers, f"{architecture}Config")(**sizes, **overrides)
    with pytest.raises(EngineError, match=words):
        family_of(config)


def test_layers_with_and_without_experts() -> None:
    config = config_of("Qwen3Moe", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])
    family = family_of(config)
    assert family.transformer_config(config)["moe_layer_freq"] == [0, 1, 0, 0]
    names = [named.name for named in family.body(config)]
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names
    assert "model.layers.3.mlp.up_proj.weight" in names
    assert "model.layers.3.mlp.experts.0.up_proj.weight" not in names


@pytest.mark.parametrize(("normalised", "before_choosing"), [(True, False), (False, True)])
def test_routing_weights_are_normalised_as_in_the_model(normalised: bool, before_choosing: bool) -> None:
    config = config_of("Qwen3Moe", norm_topk_prob=normalised)
    assert family_of(config).transformer_config(config)["moe_router_pre_softmax"] is before_choosing


def alone() -> Parallel:
    """One process without process groups."""
    sizes = dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "world"), 1)
    ranks = dict.fromkeys(("rank", "tp_rank", "pp_rank", "cp_rank", "ep_rank", "etp_rank", "dp_rank"), 0)
    fields = Parallel.__dataclass_fields__
    return Parallel(**sizes, **ranks, **{name: None for name in fields if name.endswith("_group")})  # type: ignore[arg-type]


def module_of(parameters: dict[str, torch.Tensor], layers: int) -> nn.Module:
    """A module with these parameters, as far as the conversion looks at a ``GPTModel``."""
    root: Any = nn.Module()
    for name, tensor in parameters.items():
        owner = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, nn.Parameter(tensor))
    root.decoder.layers = nn.ModuleList([getattr(root.decoder.layers, str(layer)) for layer in range(layers)])
    for number, layer in enumerate(root.decoder.layers):
        layer.layer_number = number + 1
    root.head, root.share_embeddings_and_output_weights = "policy", False
    return root  # type: ignore[no-any-return]


def test_layers_of_transformer_engine_have_other_names(tmp_path: Path) -> None:
    """Norms are part of the following matrices, all experts are one module; the router's norm is separate."""
    cpu_emulation.install()  # before anything imports megatron-core in this process
    overrides = {**ARCHITECTURES["Qwen3Moe"], "head_dim": 8, "tie_word_embeddings": False}
    tiny_model(tmp_path, architecture="Qwen3Moe", **overrides)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    hidden, width = config.hidden_size, config.moe_intermediate_size
    parameters = {
        "embedding.word_embeddings.weight": torch.empty(config.vocab_size + 3, hidden),
        "decoder.final_layernorm.weight": torch.empty(hidden),
        "output_layer.weight": torch.empty(config.vocab_size + 3, hidden),
        "decoder.layers.0.pre_mlp_layernorm.weight": torch.empty(hidden),
        "decoder.layers.0.mlp.router.weight": torch.empty(4, hidden),
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": torch.empty(hidden),
        "decoder.layers.1.mlp.linear_fc1.weight": torch.empty(2 * config.intermediate_size, hidden),
        "decoder.layers.1.mlp.linear_fc2.weight": torch.empty(hidden, config.intermediate_size),
    }
    for expert in range(4):
        parameters[f"decoder.layers.0.mlp.experts.linear_fc1.weight{expert}"] = torch.empty(2 * width, hidden)
        parameters[f"decoder.layers.0.mlp.experts.linear_fc2.weight{expert}"] = torch.empty(hidden, width)
    for layer in range(2):
        attention = f"decoder.layers.{layer}.self_attention"
        parameters[f"{attention}.linear_qkv.layer_norm_weight"] = torch.empty(hidden)
        parameters[f"{attention}.linear_qkv.weight"] = torch.empty(64, hidden)
        parameters[f"{attention}.linear_proj.weight"] = torch.empty(hidden, 32)
        parameters[f"{attention}.q_layernorm.weight"] = torch.empty(8)
        parameters[f"{attention}.k_layernorm.weight"] = torch.empty(8)
    modules = [module_of(parameters, layers=2)]
    family = family_of(config)
    load_pretrained(modules, family, config, tmp_path, alone())
    streamed = {
        name: tensor for bucket in export(modules, family, config, alone(), 1 << 14) for name, tensor in bucket.tensors
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(streamed) == set(file.keys())
        for name, tensor in streamed.items():
            assert torch.equal(tensor, file.get_tensor(name)), name
    assert int(modules[0].output_layer.weight[config.vocab_size :].count_nonzero()) == 0  # type: ignore[union-attr, operator, index]


def test_a_new_family_is_a_small_declaration(tmp_path: Path) -> None:
    """Declare a model whose matrices have other names, and convert it in one process."""
    cpu_emulation.install()
    family = Family(
        "custom",
        layer=(
            Weight("attn.q.weight", "self_attention.linear_qkv.weight", "query", split=0),
            Weight("attn.k.weight", "self_attention.linear_qkv.weight", "key", split=0),
            Weight("attn.v.weight", "self_attention.linear_qkv.weight", "value", split=0),
            Weight("mlp.gate.weight", "mlp.linear_fc1.weight", "gate", split=0),
            Weight("mlp.up.weight", "mlp.linear_fc1.weight", "up", split=0),
        ),
    )
    config = config_of("Llama", num_hidden_layers=1)
    shapes = {"attn.q": 64, "attn.k": 32, "attn.v": 32, "mlp.gate": 48, "mlp.up": 48}
    tensors = {f"model.layers.0.{name}.weight": torch.randn(rows, 32) for name, rows in shapes.items()}
    full = {"model.embed_tokens.weight": torch.randn(70, 32), **tensors, "model.norm.weight": torch.randn(32)}
    from safetensors.torch import save_file

    save_file(full, tmp_path / "model.safetensors")
    modules = [
        module_of(
            {
                "embedding.word_embeddings.weight": torch.empty(70, 32),
                "decoder.final_layernorm.weight": torch.empty(32),
                "decoder.layers.0.self_attention.linear_qkv.weight": torch.empty(128, 32),
                "decoder.layers.0.mlp.linear_fc1.weight": torch.empty(96, 32),
            },
            layers=1,
        )
    ]
    load_pretrained(modules, family, config, tmp_path, alone())
    streamed = [pair for bucket in export(modules, family, config, alone(), 1 << 20) for pair in bucket.tensors]
    assert [name for name, _ in streamed] == list(full)
    assert all(torch.equal(tensor, full[name]) for name, tensor in streamed)
