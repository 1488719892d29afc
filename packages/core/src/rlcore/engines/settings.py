"""What every backend needs to know, whatever its own options are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlcore.config import Config, FileName, Package, Seconds

if TYPE_CHECKING:
    from rlcore.engines.train import TrainEngine

Head = Literal["policy", "value", "score"]
DType = Literal["float32", "bfloat16"]


def names_a_folder(model: str) -> bool:
    """Return whether a model's name is that of a folder, existing or not, and not ``name`` or ``org/name`` on the Hub.

    ``runs/model`` does where there is a folder ``runs``: a mistyped folder should not be looked for on the Hub.
    """
    path = Path(model).expanduser()
    local = path.is_absolute() or model.startswith(("./", "../")) or model.count("/") > 1
    return local or path.is_dir() or (model.count("/") == 1 and path.parent.is_dir())


class ModelSettings(Config):
    """Which model, and how its files are read."""

    path: FileName = Field(description="Model folder (Hugging Face format) or Hub name.")
    tokenizer_path: FileName | None = Field(
        None, description="Tokenizer folder or Hub name; the model's own when null."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    attn_implementation: str | None = Field(
        None, description="Attention implementation for the backend; null picks the fastest correct one."
    )
    ignored_weights: tuple[str, ...] = Field(
        (),
        description="Tensors in the model's files that may be left out because the model does not take them: names, or "
        "patterns with *. All others that it does not take are an error.",
    )
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Precision of the weights of an exported model; null is that of the model's own files."
    )
    export_file_mb: int = Field(
        4096, gt=0, description="Maximum size of a weight file of an exported model, in MiB; a tensor is never divided."
    )

    def packages(self) -> Iterator[tuple[str, Package]]:
        if self.attn_implementation == "flash_attention_2":
            yield "attn_implementation", Package("flash_attn", "flash-attn")


class OptimSettings(Config):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW β₁ and β₂.")
    eps: float = Field(1e-8, gt=0, description="AdamW ε.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay; never on biases and norms.")
    clip_grad: float | None = Field(1.0, gt=0, description="Maximum global gradient norm; null does not clip.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    warmup_ratio: float = Field(
        0.0, ge=0, le=1, description="Linear warm-up as a share of total_steps, in place of warmup_steps."
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Final learning rate as a fraction of the peak.")
    total_steps: int | None = Field(
        None, gt=0, description="Optimizer steps of the schedule; null lets the recipe fill in the length of the run."
    )

    @property
    def warmup(self) -> int:
        """Optimizer steps of linear warm-up, from ``warmup_steps`` or ``warmup_ratio``."""
        return self.warmup_steps or int(self.warmup_ratio * (self.total_steps or 0))

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.warmup_steps and self.warmup_ratio:
            yield (
                "warmup_ratio",
                f"is {self.warmup_ratio:g}, but warmup_steps={self.warmup_steps} is set: keep one of them",
            )


class LoRASettings(Config):
    """Low-rank adapters added to frozen weights (LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    A training engine that knows them has a section ``lora`` of this type among its options.
    """

    rank: int = Field(16, ge=1, le=2**16, description="Inner width r of an adapter's two matrices.")
    alpha: float = Field(32.0, gt=0, description="A layer computes W x + alpha / rank · B A x.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout before A, in training only; with reinforcement learning the policy that is trained is "
        "then not quite the one that generated.",
    )
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Last parts of the names of the linear layers that get adapters (q_proj, v_proj …); null: all but "
        "the head.",
    )


def adapter_rank(train_options: Config) -> int | None:
    """Rank of the adapters that a training engine with these options trains; None if it trains whole weights."""
    lora = getattr(train_options, "lora", None)
    return lora.rank if isinstance(lora, LoRASettings) else None


def without_adapters(train_options: Config) -> Config:
    """``train_options`` for a model whose whole weights are used."""
    return train_options if adapter_rank(train_options) is None else train_options.model_copy(update={"lora": None})


def wants_adapters(rollout_options: Config) -> bool:
    """Return whether a rollout engine with these options takes adapters instead of full weights (``enable_lora``)."""
    return getattr(rollout_options, "enable_lora", False) is True


def keeps_weights(rollout_options: Config) -> bool:
    """Return whether a rollout engine with these options takes no new weights (``reload: none``)."""
    return getattr(rollout_options, "reload", None) == "none"


def gives_logprobs(rollout_options: Config) -> bool:
    """Return whether a rollout engine with these options returns log-probs of sampled tokens (``logprobs: true``)."""
    return getattr(rollout_options, "logprobs", True) is not False


class RewardSettings(Config):
    """Limits under which reward functions run."""

    workers: int = Field(
        4, ge=1, le=4096, description="Maximum worker processes of the reward pool; they start as needed."
    )
    timeout_s: Seconds = Field(10.0, gt=0, description="Seconds one sample may take before its worker is killed.")
    startup_timeout_s: Seconds = Field(
        120.0, gt=0, description="Seconds a worker may take to import the function, and for its first call."
    )
    memory_mb: int = Field(2048, gt=0, description="Memory a worker and its children may use, in MiB.")
    max_processes: int = Field(64, gt=0, le=2**20, description="Processes a worker and its children may be.")
    max_output_kb: int = Field(1024, gt=0, description="Output (stdout and stderr) one sample may print, in KiB.")
    pass_env: tuple[str, ...] = Field(
        (), description="Environment variables (API keys …) that workers see besides PATH, HOME, locale and the like."
    )
    error_score: float = Field(0.0, description="Score of a sample whose reward failed.")


class WeightSyncSettings(Config):
    """How weights get from a trainer into rollout engines of other processes."""

    transport: Literal["auto", "gloo", "nccl", "shm", "ipc"] = Field(
        "auto",
        description="'auto' takes shared memory (shm) or CUDA IPC (ipc) on one machine or GPU, else gloo or NCCL.",
    )
    bucket_mb: int = Field(512, gt=0, description="Weights that travel at a time, in MiB; two exist at most.")
    delta: bool = Field(
        False,
        description="Send only the elements whose bits changed: fewer bytes for a copy of the weights in host memory, "
        "at both ends.",
    )
    timeout_s: Seconds = Field(300.0, gt=0, description="Timeout of waiting for the other end.")


@dataclass(frozen=True)
class TrainEngineSpec:
    """Everything a plugin needs to build one `TrainEngine`.

    Attributes:
        head: "policy" (language-model head), "value" or "score" (one scalar per token; see `TrainEngine`).
        optim: None builds a frozen engine (reference policy, reward model): `train` is an error there.
        max_tokens: token budget of one micro-batch.
        seed: initialises new heads; the same on every rank.
        max_length: longest sequence that the run may make, in tokens; None if unknown.
        options: the backend's own section, already validated.
        new_head: a score head that the model's files lack may start with new weights, of which the engine warns; a
            value head always may.
        head_outputs: numbers per token of a score head.
    """

    model: ModelSettings
    options: Config
    head: Head = "policy"
    optim: OptimSettings | None = None
    max_tokens: int = 16384
    seed: int = 0
    max_length: int | None = None
    new_head: bool = False
    head_outputs: int = 1


@dataclass(frozen=True)
class ExportSpec:
    """What an engine's plugin needs to turn a checkpoint into a model folder, in a single process on the CPU.

    Attributes:
        engine: the model (``export_dtype`` and ``export_file_mb`` count) and the options of the run; no optimizer.
        checkpoint: folder that `TrainEngine.save` wrote, in any layout.
        folder: what to write; there is none yet.
        adapter: write the adapters alone, in PEFT's format, instead of complete weights.
    """

    engine: TrainEngineSpec
    checkpoint: Path
    folder: Path
    adapter: bool = False


@dataclass(frozen=True)
class RolloutSpec:
    """Everything a plugin needs to build one `RolloutEngine`.

    Attributes:
        max_model_len: longest prompt plus completion, in tokens.
        train_engine: the policy in the same process, or None; `inline` generates with its weights if it is a
            `WeightLender`.
        adapter_rank: of the LoRA adapters that the policy trains; None if it trains whole weights.
    """

    model: ModelSettings
    options: Config
    max_model_len: int
    seed: int = 0
    train_engine: TrainEngine | None = None
    adapter_rank: int | None = None
