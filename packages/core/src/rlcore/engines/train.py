"""`TrainEngine`: sharded forward, one optimizer step, weight export, checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from typing_extensions import TypedDict  # which pydantic describes, unlike that of Python 3.11

from rlcore.batch import Batch
from rlcore.controller.dispatch import Dispatch, dispatch
from rlcore.engines.step_memory import StepMemory
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore.metrics import Metrics

TRAIN_ENGINE_INTERFACE = 1

Output = Literal[
    "logprobs", "entropy", "values", "candidate_logprobs", "top_ids", "top_logprobs", "states", "divergence"
]
Part = Literal["params", "optimizer"]


class FileRecord(TypedDict):
    """What a file holds: its ``size`` in bytes and the hexadecimal ``sha256`` of its contents."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class OutputLayer:
    """What makes logits of the hidden states of another model: ``cap · tanh(scale · (W h + b) / cap)``.

    Attributes:
        weight: ``[vocabulary, hidden]``, in the precision of the model's forward pass.
        bias: ``[vocabulary]`` or None.
        cap: bound on the logits; None has none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The output "divergence": a divergence from the distribution of another model, over the whole vocabulary.

    The other model's logits are computed from its hidden states, chunk by chunk next to the model's own: hidden states
    are some thirty times smaller than logits, and no process holds ``[T, vocabulary]``.

    Attributes:
        terms: makes summands ``[C, K]`` of the log-probs ``[C, K]`` of the model and of the other model; picklable.
            Their sum over the vocabulary is the divergence. Only the first argument has a gradient.
        states: jagged column ``[T, hidden]``: the output "states" of the other model.
        layer: the name under which the engine holds the other model's output layer (`TrainEngine.hold_output_layer`).
        vocabulary: both distributions are over the first so many token ids.
    """

    terms: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    states: str
    layer: str
    vocabulary: int


@dataclass(frozen=True)
class ForwardRequest:
    """What a forward pass computes, and which samples it must not divide.

    Outputs of a policy head that compare models, all describing the distribution that predicts ``tokens[t]``:

    - "candidate_logprobs" ``[T, k]``: log-probs of the token ids in the column ``candidates``;
    - "top_ids" (int64) and "top_logprobs" ``[T, k]``: the ``top_k`` most likely tokens, the best first; no gradient;
    - "states" ``[T, hidden]``: the hidden states before the output layer, in the model's precision; no gradient;
    - "divergence" ``[T]``: see `Comparison`.

    Attributes:
        outputs: per-token columns. "logprobs" and "entropy" need a policy head, "values" a value or score head.
            With a *value* head entry *t* is the value of the state before ``tokens[t]``; with a *score* head entry
            *t* is the scalar read **at** ``tokens[t]`` (the sequence's score stands at its last token); ``[T, k]`` with
            a head that gives k numbers (`TrainEngineSpec.head_outputs`).
        temperature: logits are divided by it before log-probs and entropy.
        together: a dense column with one integer per sample, such as ``group`` or a pair's number. Samples with the
            same number are one unit of an `Objective` (its loss compares them): they are on one rank and in one
            micro-batch of `TrainEngine.train`, be they more tokens than the budget. None: every sample is alone.
        adapters: False computes with the frozen weights alone, as if the engine had no adapters: log-probs of the
            reference policy. For `TrainEngine.forward` of an engine that trains adapters.
        candidates: jagged column ``[T, k]`` int64 of token ids for "candidate_logprobs".
        top_k: how many tokens "top_ids" and "top_logprobs" name.
        vocabulary: "logprobs", "top_ids" and "top_logprobs" are those of the distribution over the first so many token
            ids, renormalised (a padded vocabulary has ids that are no tokens); None: over all. For forward passes
            without gradient.
        comparison: what "divergence" is.
        embedding_noise: NEFTune's alpha: uniform noise of up to ± alpha / √(length · hidden) is added to the embeddings
            of each sample, drawn with its seed in the dense column ``noise_seed`` (int64). For objectives; 0 adds none.
    """

    outputs: tuple[Output, ...] = ("logprobs",)
    temperature: float = 1.0
    together: str | None = None
    adapters: bool = True
    candidates: str | None = None
    top_k: int = 0
    vocabulary: int | None = None
    comparison: Comparison | None = None
    embedding_noise: float = 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a batch that the outputs are computed from, next to ``tokens`` and ``loss_mask``."""
        named = (self.candidates, self.comparison.states if self.comparison is not None else None)
        return tuple(name for name in named if name is not None)


class Objective(Protocol):
    """A loss over one mini-batch, whose value does not depend on how the mini-batch is divided.

    It is data (picklable), shipped to every worker. The engine calls `denominators` on its own part of the mini-batch,
    sums the results over data-parallel ranks, and hands them to every micro-batch's `loss`; the sum of all
    micro-batches' losses over all ranks is the loss of the mini-batch.
    """

    @property
    def request(self) -> ForwardRequest:
        """What the engine must compute, with gradient, before calling `loss`, and what `loss` must see together."""
        ...

    def denominators(self, batch: Batch) -> dict[str, float]:
        """Return sums over ``batch`` (tokens, sequences …) that normalise the loss."""
        ...

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the micro-batch's share of the loss.

        Args:
            outputs: the requested columns, each ``[T, ...]`` with gradient (fp32), aligned with
                ``batch.flat("tokens")`` and 0 where ``loss_mask`` is 0.
            batch: the micro-batch, on the engine's device. Sequences are whole, and so are the units of the
                request's ``together``.

        Returns:
            a scalar with gradient, and metrics with their reductions.
        """
        ...


class TrainEngine(ABC):
    """One model under training (or frozen), on one or many processes.

    Batches hold ``tokens`` (jagged int64) and ``loss_mask`` (jagged, 1 where the model's own token is trained on).
    Under data parallelism every rank is called with its own part; the declared dispatch divides and gathers. A part is
    an empty batch if there are fewer samples than ranks: the rank still takes part in the engine's collectives.

    Methods are called one at a time, from one thread (not always the main one), on all ranks in the same order.
    """

    @property
    @abstractmethod
    def dp_rank(self) -> int:
        """This process's data-parallel rank; ranks that work on the same samples share it."""

    @property
    @abstractmethod
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the weights and of micro-batches."""

    @abstractmethod
    @dispatch(Dispatch.SHARD, lazy=True)
    def forward(self, batch: Batch, request: ForwardRequest) -> Batch:
        """Compute per-token columns without gradient.

        Computed where ``loss_mask`` is 1 (everywhere but the first token if the batch has no ``loss_mask``); 0
        elsewhere. The model is in evaluation mode; micro-batches keep to the token budget.

        Returns:
            a batch of the requested columns only (jagged, on the CPU; fp32 but for "top_ids" and "states"), samples in
            the order given.

        Raises:
            EngineError: this engine or this head does not compute an output.
        """

    @dispatch(Dispatch.BROADCAST)
    def output_layer(self) -> OutputLayer:
        """Return a copy, on the CPU, of the layer that makes logits of the output "states"; all ranks take part.

        Raises:
            EngineError: this engine cannot, or the model has no policy head.
        """
        raise EngineError(f"{type(self).__name__} does not give its output layer: compare the k best tokens (top_k)")

    @dispatch(Dispatch.BROADCAST)
    def hold_output_layer(self, name: str, layer: OutputLayer | None) -> None:
        """Keep ``layer`` of another model, frozen, for `Comparison`, in the place of the one called ``name``.

        Args:
            layer: None forgets it.

        Raises:
            EngineError: this engine cannot.
        """
        raise EngineError(f"{type(self).__name__} holds no other output layers: compare the k best tokens (top_k)")

    @abstractmethod
    @dispatch(Dispatch.SHARD, together=lambda batch, objective: objective.request.together)
    def train(self, batch: Batch, objective: Objective) -> Metrics:
        """Make one optimizer step over one mini-batch, divided into micro-batches under the token budget.

        `Batch.micro_batches` keeps the units of ``objective.request.together``.

        A step whose gradient norm is not finite is skipped (weights and optimizer unchanged) and counted as
        ``skipped_steps``; it still counts for the schedule.

        Returns:
            on each rank the objective's metrics over its own part, which the dispatch merges; plus ``grad_norm``
            (before clipping), ``lr`` and ``skipped_steps``, which are the same on all ranks and recorded as "max".

        Raises:
            EngineError: the engine was built without an optimizer; or an error (of the objective, say) broke off an
                earlier step and left gradients that the backend cannot drop.
        """

    @dispatch(Dispatch.BROADCAST)
    def step_memory(self) -> StepMemory | None:
        """Return the memory that a step takes in this process and the free memory; None if the engine cannot tell."""
        return None

    @dispatch(Dispatch.BROADCAST)
    def set_token_budget(self, tokens: int) -> None:
        """Change the token budget of micro-batches; every process of the engine is given the same.

        Called only if the engine has a `step_memory`.
        """
        raise NotImplementedError

    @abstractmethod
    @dispatch(Dispatch.STREAM)
    def export_weights(self, bucket_bytes: int = 512 << 20) -> Iterator[WeightBucket]:
        """Stream full tensors as Hugging Face model files name and hold them, in the model's order, tied weights once.

        Adapters, if the engine trains them, are merged into the weights that they belong to.
        At most two buckets exist at a time. A tensor larger than ``bucket_bytes`` has a separate bucket.
        All ranks must consume the stream to its end.
        """

    @dispatch(Dispatch.STREAM)
    def export_adapters(self, bucket_bytes: int = 512 << 20) -> Iterator[WeightBucket]:
        """Stream the adapters alone, for a rollout that holds the frozen weights (`RolloutEngine.takes_adapters`).

        A linear layer ``m`` that computes ``W x + B A x`` gives ``base_model.model.m.lora_A.weight`` (A,
        ``[rank, in]``) and ``base_model.model.m.lora_B.weight`` (B, ``[out, rank]``, the factor alpha / rank included),
        which are the names in PEFT's files. All ranks must consume the stream to its end.

        Raises:
            EngineError: this engine trains no adapters.
        """
        raise EngineError(f"{type(self).__name__} trains no adapters: set the rollout's enable_lora to false")

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def save(self, path: Path) -> None:
        """Write weights, optimizer, schedule and RNG states to the folder ``path``, sharded; all ranks take part.

        Raises:
            CheckpointError: a file could not be written; the message names it.
        """

    @dispatch(Dispatch.BROADCAST)
    def start_save(self, path: Path) -> None:
        """Begin what `save` does, and return when its contents are safe from what training does next.

        ``path`` may be another folder in every process. `finish_save` comes before the next save. An engine that
        overrides none of these methods saves here.
        """
        self.save(path)

    @dispatch(Dispatch.BROADCAST)
    def save_done(self) -> bool:
        """Return whether this process has written everything, or failed, so that `finish_save` need not wait for it."""
        return True

    @dispatch(Dispatch.BROADCAST)
    def finish_save(self) -> dict[str, FileRecord]:
        """Wait until all ranks have written what `start_save` began.

        Returns:
            the files that this process wrote in the last save (`save` included), by their paths in its folder; empty
            if the engine computes no checksums, or if this has been asked before.

        Raises:
            CheckpointError: a file could not be written on some rank; the message names it.
        """
        return {}

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def load(self, path: Path) -> None:
        """Restore what `save` wrote, whatever the number of ranks was then.

        Raises:
            CheckpointError: missing, damaged, or of another model; nothing is changed then.
        """

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def save_pretrained(self, path: Path) -> None:
        """Write a folder that ``transformers.AutoModel….from_pretrained`` loads.

        Weights have the precision of the files that the model came from, or ``ModelSettings.export_dtype``; its
        ``generation_config.json`` is copied. Weights are written first: if another file cannot be written, they stay.

        Raises:
            EngineError: on every rank, if something could not be written.
        """

    @abstractmethod
    @dispatch(Dispatch.BROADCAST, lazy=True)
    def offload(self, *parts: Part) -> None:
        """Move parts (all by default) to host memory; idempotent."""

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def onload(self, *parts: Part) -> None:
        """Move parts (all by default) back to the device; idempotent. `train` and `forward` do so themselves."""

    @dispatch(Dispatch.BROADCAST)
    def close(self) -> None:
        """Release resources; the engine is not used afterwards."""
        return
