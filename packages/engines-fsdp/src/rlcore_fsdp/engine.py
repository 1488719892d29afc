"""`FSDPTrainEngine`: PyTorch FSDP2 over a Hugging Face model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from rlcore.batch import Batch, state_positions, to_column, token_positions
from rlcore.boundary import boundary
from rlcore.engines import ForwardRequest, Objective, OutputLayer, TrainEngine, TrainEngineSpec, WeightBucket
from rlcore.engines.step_memory import StepMemory
from rlcore.engines.train import FileRecord, Part
from rlcore.errors import EngineError
from rlcore.metrics import Metrics
from rlcore.progress import report
from rlcore_fsdp import lora, sharding
from rlcore_fsdp.attention import Packing, choose_kernel
from rlcore_fsdp.embedding_noise import embedding_noise
from rlcore_fsdp.memory import step_memory
from rlcore_fsdp.model_building import build_model
from rlcore_fsdp.offloading import Offloading
from rlcore_fsdp.optimizer import make_optimizer
from rlcore_fsdp.packed_model import training_mode
from rlcore_fsdp.prefix_sharing import divide_families, share_prefixes
from rlcore_fsdp.saving import Saving
from rlcore_fsdp.settings import FSDPSettings
from rlcore_fsdp.verification import TESTED, shares_exactly, verify_packing, verify_values
from rlcore_fsdp.weights import buckets, full_weights
from rlcore_fsdp.writing import write_others
from rlcore_kit.model_folder import files
from rlcore_kit.model_folder.length import check_rope
from rlcore_kit.model_folder.loading import read_config
from rlcore_kit.model_folder.tensor_names import to_model_files
from rlcore_kit.model_folder.writing import ADAPTERS, write_on_first_rank
from rlcore_kit.training.device import choose_device
from rlcore_kit.training.lr_schedule import learning_rate
from rlcore_kit.training.micro_batches import (
    check_batch,
    check_request,
    columns_at,
    in_order,
    inputs_of,
    micro_batches,
    micro_batches_of_families,
)
from rlcore_kit.training.policy_outputs import shard_of
from rlcore_kit.training.process_group import gather_objects, join_processes, max_over_ranks, own_rank, sum_over_ranks


def build(spec: TrainEngineSpec) -> FSDPTrainEngine:
    """Build the engine of this process; in the environment of ``torchrun`` every process calls it.

    Raises:
        EngineError: the model cannot be loaded or the settings do not fit this machine.
    """
    return FSDPTrainEngine(spec)


class FSDPTrainEngine(TrainEngine):
    """See `TrainEngine` for the contract.

    A single process whose weights have the precision of the forward pass runs the plain module. In all other cases
    (several processes, fp32 master weights with a bf16 forward pass, parameters in host memory) FSDP2 shards it, in a
    process group of one if there is none.

    Attributes:
        model: the Hugging Face model. Its parameters are shards under FSDP; use `generation_weights` for full ones.
        step_count: incremented whenever weights change, so that users of derived copies see that these are stale.
    """

    def __init__(self, spec: TrainEngineSpec) -> None:
        if not isinstance(spec.options, FSDPSettings):
            raise EngineError(f"options of the fsdp engine are FSDPSettings, not {type(spec.options).__name__}")
        self.spec = spec
        self.settings = settings = spec.options
        self._device = choose_device(settings.device)
        self._world = join_processes(self._device)
        default = "bfloat16" if self._device.type == "cuda" else "float32"
        self.param_dtype = getattr(torch, settings.param_dtype or default)
        master = settings.master_dtype or ("float32" if spec.optim else None)
        self.master_dtype = getattr(torch, master) if master else self.param_dtype
        self._kernel = choose_kernel(spec.model.attn_implementation, self._device, self.param_dtype)
        config = read_config(spec.model, spec.head, spec.new_head, spec.head_outputs)
        if spec.max_length is not None:
            check_rope(spec.model, config, spec.max_length, "the longest sequence of the run")
        self.root = build_model(
            spec,
            settings,
            config,
            device=self._device,
            world=self._world,
            param_dtype=self.param_dtype,
            master_dtype=self.master_dtype,
        )
        self._optimizer = self._prepare_training()
        self._saving = Saving(self.model, self._optimizer, head=spec.head, lora=settings.lora, dtype=self.param_dtype)
        self._schedule_step = 0
        movable = self._device.type != "cpu" and not settings.offload_params
        self._offloading = Offloading(self.root, self._optimizer, self._device, movable)
        self.step_count = 0
        self._in_use_for_generation = False
        self._broken = False
        origin = gather_objects(files.Origin.of(spec.model, spec.head) if self.dp_rank == 0 else None)[0]
        assert origin is not None
        self._origin = origin
        self._verify(config)

    def _prepare_training(self) -> torch.optim.Optimizer | None:
        """Select the trained parameters and build their optimizer; None if the model is frozen."""
        self.root.eval().requires_grad_(False)
        trained = [parameter for _, parameter in lora.trained_parameters(self.model)]
        for parameter in trained:
            parameter.requires_grad_(self.spec.optim is not None)
        if self.settings.gradient_checkpointing:
            if not self.model.supports_gradient_checkpointing:
                raise EngineError(
                    f"{type(self.model).__name__} does not support gradient_checkpointing in transformers"
                )
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        return make_optimizer(trained, self.spec.optim) if self.spec.optim else None

    def _verify(self, config: Any) -> None:
        with boundary(f"the packed forward pass of {type(self.model).__name__} fails", EngineError):
            if self.spec.head == "policy" and config.model_type not in TESTED:
                with self.generation_weights():
                    verify_values(self.root, self._kernel, self._device)
            verify_packing(self.root, self._kernel, self._device, self.param_dtype, self.spec.max_length)
            self._sharing = self.settings.share_prefixes and shares_exactly(
                self.root, self._kernel, self._device, self.param_dtype
            )
        if self._sharded:
            sharding.reshard(self.root)

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model; under FSDP its parameters are shards."""
        return self.root.model

    @property
    def dp_rank(self) -> int:
        return own_rank()

    @property
    def dp_size(self) -> int:
        """Number of ranks."""
        return self._world

    @property
    def device(self) -> torch.device:
        """Device of the forward pass."""
        return self._device

    @property
    def _sharded(self) -> bool:
        return isinstance(self.root, FSDPModule)

    def step_memory(self) -> StepMemory:
        args = self.spec.head, self.settings, self._device, self.param_dtype, self._optimizer, self._sharded
        return step_memory(self.model, *args)

    def set_token_budget(self, tokens: int) -> None:
        self.spec = replace(self.spec, max_tokens=tokens)

    # --- computing -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: Batch, request: ForwardRequest) -> Batch:
        self._check(batch, request)
        self.onload("params")
        batch = inputs_of(batch, request)
        order: list[int] = []
        parts: list[dict[str, torch.Tensor]] = []
        divided = self._micro_batches(batch)
        for index, members in enumerate(divided):
            outputs = self._outputs(batch.take(members), request)
            order += members
            parts.append({name: value.cpu() for name, value in outputs.items()})
            report(f"micro-batches computed ({', '.join(request.outputs)})", index + 1, len(divided))
        if self._sharded and not self._in_use_for_generation:
            sharding.reshard(self.root)
        lengths = batch.lengths[order]
        columns = {str(name): torch.cat([part[name] for part in parts]) for name in request.outputs}
        return in_order(columns, lengths, order)

    @torch.no_grad()
    def output_layer(self) -> OutputLayer:
        """See `TrainEngine`; under FSDP all ranks take part."""
        if self.spec.head != "policy":
            super().output_layer()
        self.onload("params")
        with self._as_shards():
            layer: Any = self.model.get_output_embeddings()
            rule = self.root.rule
            weight = sharding.full(layer.weight).to("cpu", self.param_dtype, copy=True)
            bias = None if layer.bias is None else sharding.full(layer.bias).to("cpu", self.param_dtype, copy=True)
        return OutputLayer(weight, bias, rule.scale, rule.cap)

    def hold_output_layer(self, name: str, layer: OutputLayer | None) -> None:
        self.root.others.pop(name, None)
        if layer is not None:
            self.root.others[name] = shard_of(layer, None, self._device)

    def train(self, batch: Batch, objective: Objective) -> Metrics:
        if self._optimizer is None or self.spec.optim is None:
            raise EngineError("this engine was built without an optimizer (a frozen model) and cannot train")
        if self._broken:
            raise EngineError(
                "an earlier training step of this engine failed and left gradients behind; build a new engine"
            )
        request = objective.request
        self._check(batch, request, training=True)
        self.onload("params")
        denominators = sum_over_ranks(objective.denominators(batch), torch.device("cpu"))
        divided = self._micro_batches(batch, request.together)
        parts: list[Metrics] = []
        try:
            for index, members in enumerate(divided):
                self._accumulate(last=index == len(divided) - 1)
                micro = batch.take(members)
                with training_mode(self._with_training_mode):  # also backward, which recomputes checkpointed layers
                    outputs = self._outputs(micro, request)
                    if members:
                        loss, metrics = objective.loss(outputs, micro.to(self._device), denominators)
                        parts.append(metrics)
                    else:  # other ranks still have sequences: take part in their communication
                        loss = torch.stack([output.sum() for output in outputs.values()]).sum() * 0.0
                    # FSDP averages gradients over ranks, the objective needs their sum
                    (loss * self._world).backward()
                report("micro-batches trained on", index + 1, len(divided))
        except BaseException:
            self._optimizer.zero_grad()
            self._broken = self._sharded  # FSDP2 holds unreduced gradients that cannot be dropped
            raise
        metrics = Metrics.merge(parts)
        self._step(metrics)
        return metrics

    def _check(self, batch: Batch, request: ForwardRequest, training: bool = False) -> None:
        check_request(request, self.spec.head, self.settings.lora is not None, training)
        embeddings: Any = self.model.get_input_embeddings()
        check_batch(batch, self.spec.model, self.model.config, embeddings.num_embeddings, request)

    def _micro_batches(self, batch: Batch, together: str | None = None) -> list[list[int]]:
        count = partial(max_over_ranks, device=torch.device("cpu"))
        budget = self.spec.max_tokens
        if together is not None or not self._sharing:
            return micro_batches(batch, budget, together, count)
        families, sizes = divide_families(batch.flat("tokens"), batch.lengths.tolist(), budget)
        return micro_batches_of_families(families, sizes, budget, count)

    def _shares(self, request: ForwardRequest) -> bool:
        """Return whether equal prefixes of different rows have equal states, and are computed once."""
        lora_settings = self.settings.lora
        dropout = lora_settings is not None and lora_settings.dropout > 0 and torch.is_grad_enabled()
        return self._sharing and not dropout and not request.embedding_noise

    def _outputs(self, micro: Batch, request: ForwardRequest) -> dict[str, torch.Tensor]:
        """Compute the requested columns ``[T]`` of a micro-batch that is on the CPU."""
        lengths = micro.lengths
        mask = micro.flat("loss_mask") if "loss_mask" in micro else None
        positions = token_positions(lengths, mask, head=self.spec.head)
        tokens, total = micro.flat("tokens"), micro.total_tokens
        if total == 0:
            tokens, lengths = tokens.new_zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
        columns = columns_at(micro, positions, request)
        states, targets = state_positions(positions, head=self.spec.head), tokens[positions]
        shared = share_prefixes(tokens, lengths.tolist()) if self._shares(request) else None
        if shared is None:
            packing = Packing(tuple(length for length in lengths.tolist() if length), self._kernel, self._device)
        else:
            packing = Packing(shared.runs, self._kernel, self._device, shared.first, shared.prefixes)
            tokens, states = tokens[shared.tokens], shared.places[states]
        tokens, states, targets, positions = (x.to(self._device) for x in (tokens, states, targets, positions))
        # a proxy, because FSDP would round what it finds in a dict to the precision of the model
        inputs = MappingProxyType({name: values.to(self._device) for name, values in columns.items()})
        with nullcontext() if request.adapters else lora.switched_off(self.model):
            noise = self._noise(micro, request) if request.embedding_noise and total else None
            outputs = self.root(tokens, packing, states, targets, request, inputs, noise)
        return {name: to_column(value, positions, total) for name, value in outputs.items()}

    def _noise(self, micro: Batch, request: ForwardRequest) -> torch.Tensor:
        embeddings: Any = self.model.get_input_embeddings()
        seeds, width = micro["noise_seed"].tolist(), embeddings.embedding_dim
        return embedding_noise(micro.lengths.tolist(), seeds, width, request.embedding_noise, self._device)

    @cached_property
    def _with_training_mode(self) -> list[nn.Module]:
        """Layers that checkpoint activations and dropout of adapters; the rest stays in evaluation mode."""
        layers = sharding.decoder_layers(self.model) if self.settings.gradient_checkpointing else []
        return [*layers, *(layer.lora_dropout[lora.ADAPTER] for _, layer in lora.adapted_layers(self.model))]

    def _accumulate(self, last: bool) -> None:
        if isinstance(self.root, FSDPModule):
            self.root.set_requires_gradient_sync(last or self.settings.reduce_every_micro_batch)
            self.root.set_is_last_backward(last)

    def _step(self, metrics: Metrics) -> None:
        optim, optimizer = self.spec.optim, self._optimizer
        assert optim is not None
        assert optimizer is not None
        parameters = [parameter for parameter in self.root.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = sharding.full(nn.utils.get_total_norm(gradients))
        finite = math.isfinite(float(norm))
        lr = learning_rate(self._schedule_step, optim)
        if finite:
            if optim.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(parameters, optim.clip_grad, norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            self.onload("optimizer")
            optimizer.step()
            if self.settings.offload_optimizer:
                self.offload("optimizer")
            self.step_count += 1
        optimizer.zero_grad()
        self._schedule_step += 1
        # the same on every rank, because the dispatch merges the metrics of all ranks
        metrics.max("grad_norm", float(norm))
        metrics.max("lr", lr)
        metrics.max("skipped_steps", float(not finite))

    # --- weights -------------------------------------------------------------------------------------------------

    @contextmanager
    def generation_weights(self) -> Iterator[PreTrainedModel]:
        """See `rlcore.engines.WeightLender`. Under FSDP all ranks enter and leave together."""
        if self.spec.head != "policy":
            raise EngineError(
                f"a model with a {self.spec.head} head cannot generate; lend the weights of a policy to the rollout"
            )
        self.onload("params")
        with sharding.gathered(self.root, self.settings) if self._sharded else nullcontext():
            self._in_use_for_generation = True
            try:
                yield self.model
            finally:
                self._in_use_for_generation = False

    @contextmanager
    def _as_shards(self) -> Iterator[None]:
        """Have the parameters as shards, as the optimizer does; gather them again afterwards if they are in use."""
        if self._sharded:
            sharding.reshard(self.root)
        try:
            yield
        finally:
            if self._sharded and self._in_use_for_generation:
                sharding.unshard(self.root)

    @torch.no_grad()
    def export_weights(self, bucket_bytes: int = 512 << 20) -> Iterator[WeightBucket]:
        """See `TrainEngine`; tensors have compute precision.

        Without FSDP they may be the live parameters, not copies: use them before the next `train`.
        """
        self.onload("params")
        with self._as_shards():
            yield from buckets(self._as_model_files(lambda name: self.param_dtype), bucket_bytes)

    @torch.no_grad()
    def export_adapters(self, bucket_bytes: int = 512 << 20) -> Iterator[WeightBucket]:
        """See `TrainEngine`; tensors are copies in compute precision."""
        if self.settings.lora is None:
            super().export_adapters()
        self.onload("params")
        with self._as_shards():
            yield from buckets(lora.scaled_adapters(self.model, self.param_dtype, self._device), bucket_bytes)

    @torch.no_grad()
    def save_pretrained(self, path: Path) -> None:
        """See `TrainEngine`; weights have the precision of the files that the model came from, or ``export_dtype``.

        Adapters are merged into the weights, and are also written separately, in PEFT's format, to the subfolder
        ``adapter``.
        """
        with self._as_shards():
            adapters = lora.full_adapters(self.model) if self.settings.lora is not None else {}
            stream = self._as_model_files(lambda name: getattr(torch, self._origin.dtype_of(name)))
            others = partial(self._write_others, adapters)
            write_on_first_rank(
                stream, Path(path), others, self.dp_rank, gather_objects, self.spec.model.export_file_mb << 20
            )

    def _as_model_files(self, dtype_of: Callable[[str], torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield full weights under the names and in the form of model files; all ranks iterate to the end."""
        for name, tensor in full_weights(self.model, dtype_of, self._device):
            yield from to_model_files(self.model, name, tensor).items()

    def _write_others(self, adapters: dict[str, torch.Tensor], folder: Path, names: set[str]) -> None:
        if self.settings.lora is not None:
            lora.write_adapters(adapters, self.model, self.settings.lora, self.spec.model.path, folder / ADAPTERS)
        write_others(self.model, self._origin, folder)

    def save(self, path: Path) -> None:
        """See `TrainEngine`; the layout is that of `rlcore_fsdp.checkpoint`."""
        with self._as_shards():
            self._saving.save(Path(path), self._schedule_step)

    @torch.no_grad()
    def start_save(self, path: Path) -> None:
        """See `TrainEngine`. Takes as much host memory as this rank's weights and optimizer states, and keeps it."""
        with self._as_shards():
            self._saving.start(Path(path), self._schedule_step)

    def save_done(self) -> bool:
        return self._saving.done()

    def finish_save(self) -> dict[str, FileRecord]:
        return self._saving.finish()

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """See `TrainEngine`. A frozen engine takes the weights of a training one's checkpoint.

        With the number of ranks that saved it, training continues bit for bit; with another number, everything is
        restored but the random states of the ranks.
        """
        self.onload()
        step = self._saving.load(Path(path))
        if step is not None:
            self._schedule_step = step
        self.step_count += 1

    # --- memory --------------------------------------------------------------------------------------------------

    def offload(self, *parts: Part) -> None:
        """See `TrainEngine`. On the CPU, host memory is the device: nothing moves."""
        self._offloading.move(parts, torch.device("cpu"))

    def onload(self, *parts: Part) -> None:
        self._offloading.move(parts, self._device)
