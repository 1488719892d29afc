"""Weights on four processes: loaded into every layout, compared with transformers, and exported.

Conversion moves values, so whatever comes back is compared bit for bit. Logits, log-probs and entropies are compared
within `ATOL` in fp32: matrix products sum in another order when tensors are joined or divided.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.core_model_loading import revert_weight_conversion

from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest, ModelSettings, WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.model_folder.files import Origin
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_megatron import cpu_emulation, parallel
from rlcore_megatron.families import family_of
from rlcore_megatron.settings import MegatronSettings
from rlcore_megatron.weights import export, load_pretrained

ATOL = 5e-6
LENGTHS = (11, 5, 30)
TIMEOUT_S = 600  # the first call imports megatron-core on every rank
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# vocab_size 261 (of the tokenizer) divides by neither 2 nor 4: the vocabulary is padded
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {"head_dim": 16, "tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama-tied": ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "mistral": ("Mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [2],
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
    "mixtral-tied": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}),
}
TP2 = {"tensor_parallel": 2}
PP2 = {"pipeline_parallel": 2}
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": TP2,
    "tp2-sp": {**TP2, **SP},
    "pp2": PP2,
    "pp2-interleaved": {**PP2, "virtual_pipeline": 2},
    "tp2-pp2": {**TP2, **PP2},
    "ep2": {"expert_parallel": 2},
    "ep4": {"expert_parallel": 4},
    "ep2-pp2": {"expert_parallel": 2, **PP2},
    "tp2-ep2": {**TP2, **SP, "expert_parallel": 2, "expert_tensor_parallel": 2},
    "tp2-etp1-ep4": {**TP2, **SP, "expert_parallel": 4, "expert_tensor_parallel": 1},
}
DENSE = ("one", "tp2", "tp2-sp", "pp2", "pp2-interleaved", "tp2-pp2")
EXPERTS = ("one", "tp2-sp", "pp2", "ep2", "ep4", "ep2-pp2", "tp2-ep2", "tp2-etp1-ep4")
CASES = [(model, layout) for model in ("qwen2", "qwen2-tied") for layout in DENSE]
CASES += [(model, layout) for model in ("qwen3", "llama") for layout in ("one", "tp2-sp", "tp2-pp2")]
CASES += [(model, "one") for model in ("mistral", "qwen3-tied", "llama-tied")]
CASES += [("qwen3-tied", "tp2-pp2"), ("llama-tied", "pp2"), ("mixtral-tied", "one"), ("mixtral-tied", "ep2-pp2")]
CASES += [(model, layout) for model in ("qwen3_moe", "mixtral") for layout in EXPERTS]


class Model:
    """A model folder with random norms and biases, and what transformers compute with it."""

    def __init__(self, folder: Path, architecture: str, overrides: dict[str, Any]) -> None:
        self.folder = tiny_model(folder, architecture=architecture, num_hidden_layers=4, **overrides)
        generator = torch.Generator().manual_seed(3)
        weights = load_file(self.folder / "model.safetensors")
        for name, tensor in weights.items():
            if tensor.dim() == 1:  # else norms are 1, and biases 0
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
            elif "embed_tokens" not in name:
                tensor.mul_(4)  # so that what layers do matters
        save_file(weights, self.folder / "model.safetensors", metadata={"format": "pt"})
        self.model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokens = torch.randint(0, 261, (sum(LENGTHS),), generator=generator)
        with torch.no_grad():
            self.logits = torch.cat([self.model(part[None]).logits[0] for part in self.tokens.split(LENGTHS)])
        logprobs = self.logits.log_softmax(-1)
        chosen = logprobs[:-1].gather(1, self.tokens[1:, None])[:, 0]
        self.logprobs = torch.cat([torch.zeros(1), chosen])
        self.entropy = torch.cat([torch.zeros(1), -(logprobs.exp() * logprobs).sum(-1)[:-1]])
        firsts = torch.tensor([0, *LENGTHS]).cumsum(0)[:-1]
        self.logprobs[firsts] = self.entropy[firsts] = 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {name: Model(folder / name, architecture, overrides) for name, (architecture, overrides) in MODELS.items()}


# --- on the ranks ----------------------------------------------------------------------------------------------------


def build(folder: Path, layout: dict[str, Any], head: str = "policy", dtype: str = "float32") -> tuple[Any, ...]:
    """Empty modules, and what load and export want to know."""
    cpu_emulation.install()
    from rlcore_megatron.modules import build_modules

    device = torch.device("cpu")
    parallel.join_processes(device)
    settings = MegatronSettings(device="cpu", **layout)
    here = parallel.initialize(settings)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1)
    family = family_of(config)
    options = {"head": head, "head_bias": head == "value", "seed": 5}
    modules = build_modules(config, family, settings, here, device=device, dtype=getattr(torch, dtype), **options)
    for module in modules:
        for parameter in module.parameters():
            if parameter is not getattr(getattr(module, "output_layer", None), "weight", None) or head == "policy":
                torch.nn.init.constant_(parameter, torch.nan)  # whatever is not loaded is seen
    return modules, family, config, here


def there_and_back(folder: Path, layout: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """Load, compute and export; the exported stream is compared with the file on every rank."""
    modules, family, config, here = build(folder, layout)
    from rlcore_megatron.output_columns import OutputSizes
    from rlcore_megatron.pipeline_schedule import Pipeline

    load_pretrained(modules, family, config, folder, here)
    result: dict[str, Any] = {"unloaded": unloaded(modules)}
    batch = Batch({"tokens": Jagged(tokens, torch.tensor(LENGTHS))})
    request = ForwardRequest(("logprobs", "entropy"))
    sequence_parallel, sizes = layout.get("sequence_parallel", False), OutputSizes(modules[0].config.hidden_size)
    pipeline = Pipeline(modules, "policy", here, sequence_parallel, torch.device("cpu"), sizes)
    with torch.no_grad():
        computed = pipeline.outputs([batch] * here.pp, request)
        if here.last_stage:
            result |= dict(zip(request.outputs, computed[-1].unbind(-1)))
        if layout == LAYOUTS["one"]:
            result["logits"] = logits(modules[0], batch, here)
    result["names"], result["different"] = compare(export(modules, family, config, here, 20_000), folder)
    return result


def unloaded(modules: list[Any]) -> list[str]:
    """Parameters with something that no file gave."""
    named = [pair for module in modules for pair in module.named_parameters()]
    return [name for name, parameter in named if bool(parameter.isnan().any())]


def logits(module: Any, batch: Batch, here: Any) -> torch.Tensor:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from rlcore_megatron.packing import pack

    row = pack(batch, "policy", here, False, torch.device("cpu"), ForwardRequest(("logprobs",)))
    hidden = GPTModel.forward(module, row.tokens, None, None, packed_seq_params=row.attention)
    tied = module.share_embeddings_and_output_weights
    weight = module.shared_embedding_or_output_weight() if tied else module.output_layer.weight
    return (hidden[:, 0] @ weight.T)[:, : module.vocabulary]  # type: ignore[no-any-return]


def compare(buckets: Iterator[WeightBucket], folder: Path) -> tuple[list[str], list[str]]:
    """The names in order, and those whose tensors are not bit for bit those of the file."""
    names, different = [], []
    with safe_open(folder / "model.safetensors", "pt") as file:
        for bucket in buckets:
            for name, tensor in bucket.tensors:
                names.append(name)
                expected = file.get_tensor(name)
                same = tensor.dtype == expected.dtype and tensor.shape == expected.shape
                if not same or not torch.equal(bits(tensor), bits(expected)):
                    different.append(name)
    return names, different


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._old: set[int] = set()

    def ignore(self, tensor: torch.Tensor) -> None:
        self._old.add(tensor.untyped_storage()._cdata)

    def now(self) -> int:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._old:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result


def peak_while_exporting(folder: Path, layout: dict[str, Any], bucket_bytes: int) -> dict[str, int]:
    modules, family, config, here = build(folder, layout)
    load_pretrained(modules, family, config, folder, here)
    total = largest = 0
    storages = Storages()
    for module in modules:
        for parameter in module.parameters():
            storages.ignore(parameter)
    with storages:
        for bucket in export(modules, family, config, here, bucket_bytes):
            total += bucket.nbytes
            largest = max(largest, bucket.nbytes)
    return {"peak": storages.peak, "total": total, "largest": largest}


def load_error(folder: Path, layout: dict[str, Any]) -> str:
    modules, family, config, here = build(folder, layout)
    try:
        load_pretrained(modules, family, config, folder, here)
    except EngineError as error:
        return str(error)
    return "no error"


def bf16_there_and_back(folder: Path, layout: dict[str, Any]) -> list[str]:
    modules, family, config, here = build(folder, layout, dtype="bfloat16")
    load_pretrained(modules, family, config, folder, here)
    return compare(export(modules, family, config, here, 20_000), folder)[1]


def save_twice(source: Path, target: Path, layout: dict[str, Any], head: str) -> list[str]:
    """Write a folder in small files, and again over it in one."""
    from rlcore_megatron.writing import write_model

    modules, family, config, here = build(source, layout, head=head)
    load_pretrained(modules, family, config, source, here)
    listed = []
    for limit in (30_000, 1 << 30):
        origin = Origin.of(ModelSettings(path=str(source)), "policy")
        write_model(export(modules, family, config, here, 20_000), config, origin, target, max_file_bytes=limit)
        dist.barrier()
        listed.append(" ".join(sorted(file.name for file in target.iterdir())))
        dist.barrier()
    return listed


def save_error(source: Path, target: Path) -> str:
    from rlcore_megatron.writing import write_model

    modules, family, config, here = build(source, {**TP2, **PP2})
    load_pretrained(modules, family, config, source, here)
    try:
        origin = Origin.of(ModelSettings(path=str(source)), "policy")
        write_model(export(modules, family, config, here, 20_000), config, origin, target)
    except EngineError as error:
        return str(error)
    return "no error"


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_weights_survive_loading_and_exporting_in_every_layout(
    models: dict[str, Model], ranks: RankPool, model: str, layout: str
) -> None:
    expected = models[model]
    results = ranks.run(there_and_back, expected.folder, LAYOUTS[layout], expected.tokens, timeout=TIMEOUT_S)
    last = [result for result in results if "logprobs" in result]
    assert last
    for result in last:
        torch.testing.assert_close(result["logprobs"], expected.logprobs, rtol=0, atol=ATOL)
        torch.testing.assert_close(result["entropy"], expected.entropy, rtol=0, atol=ATOL)
    if layout == "one":
        torch.testing.assert_close(results[0]["logits"], expected.logits, rtol=0, atol=ATOL)
    names = in_order(expected)
    for result in results:
        assert result["unloaded"] == []
        assert result["names"] == names
        assert result["different"] == []


def in_order(model: Model) -> list[str]:
    """Names in files in the order of the model in memory, tied ones once."""
    with safe_open(model.folder / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    state = model.model.state_dict().items()
    written = [name for key, tensor in state for name in revert_weight_conversion(model.model, {key: tensor})]
    names = [name for name in written if name in saved]
    assert set(names) == saved
    return names


@pytest.mark.parametrize(("model", "layout"), [("qwen2", "tp2-pp2"), ("qwen3_moe", "tp2-ep2"), ("mixtral", "ep2-pp2")])
def test_exporting_holds_two_buckets_in_memory(
    models: dict[str, Model], ranks: RankPool, model: str, layout: str
) -> None:
    bucket_bytes = 64_000
    for measured in ranks.run(
        peak_while_exporting, models[model].folder, LAYOUTS[layout], bucket_bytes, timeout=TIMEOUT_S
    ):
        assert measured["total"] > 3 * bucket_bytes
        assert bucket_bytes / 2 < measured["largest"] <= bucket_bytes
        assert bucket_bytes < measured["peak"] <= 2 * bucket_bytes


def test_tensors_that_do_not_fit_are_listed_on_every_rank(
    models: dict[str, Model], ranks: RankPool, tmp_path: Path
) -> None:
    source = models["qwen3"].folder
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.3.self_attn.q_norm.weight"]  # of the second stage
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)  # of the first
    weights["model.layers.0.mlp.up_proj.bias"] = torch.zeros(64)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    messages = ranks.run(load_error, tmp_path, LAYOUTS["tp2-pp2"], timeout=TIMEOUT_S)
    assert len(set(messages)) == 1
    assert "model.layers.3.self_attn.q_norm.weight is missing" in messages[0]
    assert "model.layers.0.mlp.up_proj.bias is unknown" in messages[0]
    assert "model.layers.0.mlp.up_proj.weight has shape [48, 32], not [64, 32]" in messages[0]


@pytest.mark.parametrize("damage", ["cut", "index", "shard"])
def test_an_error_names_the_damaged_file(
    models: dict[str, Model], ranks: RankPool, tmp_path: Path, damage: str
) -> None:
    source = models["qwen2"].folder
    data = (source / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    if damage == "cut":
        (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
        words = "model.safetensors is damaged"
    elif damage == "index":
        (tmp_path / "model.safetensors.index.json").write_text("{")
        words = "model.safetensors.index.json is damaged"
    else:
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}, "metadata": {}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        words = "has no file model-00001-of-00002.safetensors, which model.safetensors.index.json names"
    for message in ranks.run(load_error, tmp_path, LAYOUTS["tp2"], timeout=TIMEOUT_S):
        assert words in message


def test_bf16_files_are_exported_bit_for_bit(models: dict[str, Model], ranks: RankPool, tmp_path: Path) -> None:
    weights = load_file(models["qwen3_moe"].folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((models["qwen3_moe"].folder / "config.json").read_text())
    assert ranks.run(bf16_there_and_back, tmp_path, LAYOUTS["tp2-ep2"], timeout=TIMEOUT_S) == [[]] * 4


@pytest.mark.parametrize(
    ("head", "model", "layout", "cls"),
    [
        ("policy", "qwen2-tied", "tp2-pp2", "AutoModelForCausalLM"),
        ("policy", "mixtral", "ep2-pp2", "AutoModelForCausalLM"),
        ("value", "qwen3", "tp2-pp2", "AutoModelForTokenClassification"),
        ("score", "llama-tied", "pp2", "AutoModelForSequenceClassification"),
    ],
)
def test_transformers_reads_written_folders(
    models: dict[str, Model], ranks: RankPool, tmp_path: Path, head: str, model: str, layout: str, cls: str
) -> None:
    target = tmp_path / "written"
    listed = ranks.run(save_twice, models[model].folder, target, LAYOUTS[layout], head, timeout=TIMEOUT_S)
    assert len(set(map(tuple, listed))) == 1
    small, one = listed[0]
    assert "model-00001-of-000" in small
    assert "model.safetensors.index.json" in small
    assert one == "config.json generation_config.json model.safetensors"
    loaded, info = getattr(transformers, cls).from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    reference = models[model].model.state_dict()
    state = loaded.state_dict()
    assert {name for name in state if not name.startswith("score.")} == set(reference) - (
        set() if head == "policy" else {"lm_head.weight"}
    )
    assert all(torch.equal(tensor, reference[name]) for name, tensor in state.items() if name in reference)
    if head != "policy":
        hidden = loaded.config.hidden_size
        fresh = torch.randn(1, hidden, generator=torch.Generator().manual_seed(5)) / (hidden + 1)
        assert torch.equal(state["score.weight"], fresh)
        assert ("score.bias" in state) == (head == "value")


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(
    models: dict[str, Model], ranks: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for message in ranks.run(save_error, models["qwen2"].folder, tmp_path / "file" / "model", timeout=TIMEOUT_S):
        assert "could not be written" in message
