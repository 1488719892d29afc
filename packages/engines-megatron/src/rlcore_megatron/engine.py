"""`MegatronEngine`: megatron-core behind the contract of `TrainEngine`.

Importing this module does not import megatron-core, which must wait until `build` knows the device: on the CPU
`rlcore_megatron.cpu_emulation` must be installed first.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from rlcore.batch import Batch
from rlcore.boundary import boundary
from rlcore.engines import ForwardRequest, Objective, OutputLayer, TrainEngine, TrainEngineSpec, WeightBucket
from rlcore.engines.step_memory import StepMemory
from rlcore.engines.train import FileRecord, Part
from rlcore.errors import EngineError
from rlcore.metrics import Metrics
from rlcore_kit.model_folder import checks, files
from rlcore_kit.training.device import choose_device
from rlcore_kit.training.lr_schedule import learning_rate
from rlcore_kit.training.micro_batches import check_batch, check_request, in_order, inputs_of, micro_batches
from rlcore_kit.training.policy_outputs import shard_of
from rlcore_kit.training.process_group import max_over_ranks, sum_over_ranks
from rlcore_megatron import parallel as layouts
from rlcore_megatron import weights
from rlcore_megatron.families import family_of
from rlcore_megatron.layout import check_layout
from rlcore_megatron.memory import Offloaded
from rlcore_megatron.model_folder import find_model
from rlcore_megatron.output_columns import OutputSizes, output_widths, separated, total_width
from rlcore_megatron.settings import MegatronSettings
from rlcore_megatron.step_memory import step_memory
from rlcore_megatron.writing import adapter_writer, write_model

if TYPE_CHECKING:
    from rlcore_megatron.modules import PackedGPT
    from rlcore_megatron.optimizer import Optimization

_PARTS: tuple[Part, ...] = ("params", "optimizer")
_EMULATION = "rlcore_megatron.cpu_emulation"


def build(spec: TrainEngineSpec) -> MegatronEngine:
    """Build the engine of this process; in the environment of ``torchrun`` every process calls it.

    Raises:
        EngineError: the model cannot be loaded or divided, or the settings do not fit this machine.
    """
    if not isinstance(spec.options, MegatronSettings):
        raise EngineError(f"options of the megatron engine are MegatronSettings, not {type(spec.options).__name__}")
    device = choose_device(spec.options.device)
    if device.type == "cpu":
        from rlcore_megatron import cpu_emulation

        cpu_emulation.install()
    elif _EMULATION in sys.modules and sys.modules[_EMULATION].installed():
        raise EngineError(
            "this process has used megatron-core on the CPU and cannot use it on CUDA; start a new process"
        )
    return MegatronEngine(spec, spec.options, device)


class MegatronEngine(TrainEngine):
    """See `TrainEngine` for the contract.

    Each data-parallel rank is a copy of the model: all tensor-, pipeline- and context-parallel ranks of a copy are
    called with the same samples and return the same results.

    Attributes:
        modules: this process's chunks of the model.
        step_count: incremented whenever weights change.
    """

    def __init__(self, spec: TrainEngineSpec, settings: MegatronSettings, device: torch.device) -> None:
        self.spec = spec
        self.settings = settings
        self._device = device
        self.folder, self.hf_config = find_model(spec.model, spec.head, spec.new_head, spec.head_outputs)
        self._origin = files.Origin.of(spec.model, spec.head)
        with boundary(f"the configuration of the model {spec.model.path!r} cannot be used", EngineError):
            self.family = family_of(self.hf_config)
            fields = self.family.transformer_config(self.hf_config)
        world = layouts.join_processes(device)
        check_layout(settings, fields, world, spec.model.path)
        self.parallel = layouts.initialize(settings)
        layouts.hold(self)
        default = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, settings.dtype or default)
        self.modules = self._load()
        self._build_training()
        self._offloaded: dict[Part, list[Offloaded]] = {}
        self._schedule_step = 0
        self.step_count = 0

    @property
    def _output_sizes(self) -> OutputSizes:
        return OutputSizes(self.modules[0].config.hidden_size, self.spec.head_outputs)

    def _load(self) -> list[PackedGPT]:
        """Build this process's chunks of the model and read their weights."""
        from rlcore_megatron.modules import build_modules

        head, tensors = self.spec.head, files.tensors(self.folder)
        modules = build_modules(
            self.hf_config,
            self.family,
            self.settings,
            self.parallel,
            device=self._device,
            dtype=self.dtype,
            head=head,
            head_bias=head == "value" or (head == "score" and "score.bias" in tensors),
            seed=self.spec.seed,
        )
        ignored = self.spec.model.ignored_weights
        weights.load_pretrained(modules, self.family, self.hf_config, self.folder, self.parallel, ignored)
        if head != "policy" and "score.weight" not in tensors and self.parallel.rank == 0:
            checks.warn_of_new_head(self.spec.model)
        return modules

    def _build_training(self) -> None:
        """Build the optimizer (unless the model is frozen), the pipeline schedule and the writer of checkpoints."""
        from rlcore_megatron.optimizer import Optimization
        from rlcore_megatron.pipeline_schedule import Pipeline
        from rlcore_megatron.saving import Saving

        spec, settings = self.spec, self.settings
        self._optimization: Optimization | None = (
            Optimization(self.modules, settings, spec.optim) if spec.optim else None
        )
        chunks: list[nn.Module] = self._optimization.chunks if self._optimization else list(self.modules)
        if self._optimization is None:
            for chunk in chunks:
                chunk.requires_grad_(False)
        self._pipeline = Pipeline(
            chunks, spec.head, self.parallel, settings.sequence_parallel, self._device, self._output_sizes
        )
        # no method of the engine: in a cycle of references, process groups of a closed engine would keep their threads
        base_model = partial(weights.base_model, self.modules, self.family, self.hf_config, self.parallel, self.dtype)
        self._saving = Saving(
            self.modules, self._optimization, self.parallel, settings.checkpoint_format, settings.lora, base_model
        )

    @property
    def dp_rank(self) -> int:
        return self.parallel.dp_rank

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.parallel.dp

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._device

    def step_memory(self) -> StepMemory:
        parameters = [parameter for module in self.modules for parameter in module.parameters()]
        return step_memory(
            self.hf_config,
            self.settings,
            self._device,
            self.dtype.itemsize,
            parameters=sum(parameter.numel() for parameter in parameters),
            data_parallel=self.parallel.dp,
            trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            stepped=self.step_count > 0,
        )

    def set_token_budget(self, tokens: int) -> None:
        self.spec = replace(self.spec, max_tokens=tokens)

    # --- computing -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: Batch, request: ForwardRequest) -> Batch:
        self._check(batch, request)
        self.onload("params")
        batch = inputs_of(batch, request)
        divided = self._micro_batches(batch)
        with nullcontext() if request.adapters else self._without_adapters():
            results = self._pipeline.outputs([batch.take(members) for members in divided], request)
        order = [index for members in divided for index in members]
        lengths = batch.lengths[order]
        given = {name: batch.flat(name) for name in request.columns}
        widths = output_widths(request, given, self._output_sizes)
        if self.parallel.last_stage:
            together = torch.cat(results)
        else:
            together = torch.empty(int(lengths.sum()), total_width(widths), device=self._device)
        if self.parallel.pp > 1:
            dist.broadcast(together, self.parallel.last_stage_rank, group=self.parallel.pp_group)
        columns = separated(together.cpu(), widths)
        if "top_ids" in columns:
            columns["top_ids"] = columns["top_ids"].long()
        return in_order(columns, lengths, order)

    @torch.no_grad()
    def output_layer(self) -> OutputLayer:
        """See `TrainEngine`; all ranks take part, and all return it."""
        if self.spec.head != "policy":
            super().output_layer()
        self.onload("params")
        last, parallel = self.modules[-1], self.parallel
        rows = -(-last.vocabulary // parallel.tp)
        weight = torch.empty(rows * parallel.tp, last.config.hidden_size, dtype=self.dtype, device=self._device)
        if parallel.last_stage:
            dist.all_gather(list(weight.split(rows)), last.output_weight.contiguous(), group=parallel.tp_group)
        if parallel.pp > 1:
            dist.broadcast(weight, parallel.last_stage_rank, group=parallel.pp_group)
        return OutputLayer(weight[: last.vocabulary].cpu())

    def hold_output_layer(self, name: str, layer: OutputLayer | None) -> None:
        last = self.modules[-1]
        others = {key: held for key, held in last.others.items() if key != name}
        if layer is not None and self.parallel.last_stage:
            others[name] = shard_of(layer, last.shard, self._device)
        last.others = others

    def train(self, batch: Batch, objective: Objective) -> Metrics:
        optimization = self._optimization
        if optimization is None or self.spec.optim is None:
            raise EngineError("this engine was built without an optimizer (a frozen model) and cannot train")
        self._check(batch, objective.request, training=True)
        self.onload("params")
        denominators = sum_over_ranks(objective.denominators(batch), self._device, self.parallel.dp_group)
        divided = [batch.take(members) for members in self._micro_batches(batch, objective.request.together)]
        try:
            with _training(self.modules, self.settings.recompute != "none"):
                metrics, error = self._pipeline.gradients(divided, objective, denominators)
            metrics = self._pipeline.agreed(metrics, error)
            self._step(optimization, metrics)
        except BaseException:
            optimization.clear_gradients()
            raise
        return metrics

    def _check(self, batch: Batch, request: ForwardRequest, training: bool = False) -> None:
        check_request(request, self.spec.head, self.settings.lora is not None, training)
        if request.embedding_noise:
            raise EngineError("the Megatron engine adds no noise to embeddings (NEFTune); the engine fsdp does")
        check_batch(batch, self.spec.model, self.hf_config, self.modules[0].vocabulary, request)

    def _without_adapters(self) -> AbstractContextManager[None]:
        from rlcore_megatron.adapters import switched_off

        return switched_off(self.modules)

    def _micro_batches(self, batch: Batch, together: str | None = None) -> list[list[int]]:
        return micro_batches(batch, self.spec.max_tokens, together, self._number_of_micro_batches)

    def _number_of_micro_batches(self, own: int) -> int:
        """Return the number that all ranks compute, of which this rank has ``own``."""
        count = max_over_ranks(own, self._device, self.parallel.dp_group)
        # the interleaved schedule needs a multiple of the number of stages
        return -(-count // self.parallel.pp) * self.parallel.pp if self.parallel.vpp > 1 else count

    def _step(self, optimization: Optimization, metrics: Metrics) -> None:
        assert self.spec.optim is not None
        norm = optimization.gradient_norm()
        finite = math.isfinite(norm)
        lr = learning_rate(self._schedule_step, self.spec.optim)
        if finite:
            self.onload("optimizer")
            optimization.step(norm, lr)
            if self.settings.offload_optimizer:
                self.offload("optimizer")
            self.step_count += 1
        optimization.clear_gradients()
        self._schedule_step += 1
        # the same on every rank, because the dispatch merges the metrics of all ranks
        metrics.max("grad_norm", norm)
        metrics.max("lr", lr)
        metrics.max("skipped_steps", float(not finite))

    # --- weights -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def export_weights(self, bucket_bytes: int = 512 << 20) -> Iterator[WeightBucket]:
        """See `TrainEngine`; tensors have compute precision and exist on every rank."""
        self.onload("params")
        yield from weights.export(self.modules, self.family, self.hf_config, self.parallel, bucket_bytes)

    @torch.no_grad()
    def export_adapters(self, bucket_bytes: int = 512 << 20) -> Iterator[WeightBucket]:
        """See `TrainEngine`; tensors have compute precision and exist on every rank."""
        lora = self.settings.lora
        if lora is None:
            super().export_adapters()
            return
        for bucket in self._adapters(bucket_bytes):
            scaled = ((n, t * (lora.alpha / lora.rank) if ".lora_B." in n else t) for n, t in bucket.tensors)
            yield WeightBucket(tuple(scaled))

    @torch.no_grad()
    def save_pretrained(self, path: Path) -> None:
        """See `TrainEngine`; weights stream to rank 0's files.

        They have the precision of the files that the model came from, or ``export_dtype``; values are those of compute
        precision. Adapters are merged into the weights, and are also written separately, in PEFT's format, to the
        subfolder ``adapter``.
        """
        limit = self.spec.model.export_file_mb << 20
        adapters = self.adapter_files() if self.settings.lora is not None else None
        write_model(self.export_weights(), self.hf_config, self._origin, Path(path), limit, adapters)

    def adapter_files(self) -> Callable[[Path], None]:
        """Return what writes the adapters, in PEFT's format, to a new folder; collective, the writing is not."""
        from rlcore_megatron.adapters import targets

        lora = self.settings.lora
        assert lora is not None
        wanted = targets(self.family, self.hf_config, lora)
        return adapter_writer(self._adapters(512 << 20), self.hf_config, lora, wanted, self.spec.model.path)

    @torch.no_grad()
    def _adapters(self, bucket_bytes: int) -> Iterator[WeightBucket]:
        self.onload("params")
        yield from weights.export(self.modules, self.family, self.hf_config, self.parallel, bucket_bytes, adapters=True)

    @torch.no_grad()
    def save(self, path: Path) -> None:
        """See `TrainEngine`; the layout is that of `rlcore_megatron.checkpoint`."""
        self.onload()
        self._saving.save(Path(path), self._schedule_step)

    @torch.no_grad()
    def start_save(self, path: Path) -> None:
        """See `TrainEngine`. Takes as much host memory as this rank's share of the checkpoint until that is written."""
        self.onload()
        self._saving.start(Path(path), self._schedule_step)

    def save_done(self) -> bool:
        return self._saving.done()

    def finish_save(self) -> dict[str, FileRecord]:
        return self._saving.finish()

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """See `TrainEngine`. A frozen engine takes the weights of a training one's checkpoint.

        In the layout that saved it, training continues bit for bit; in another layout, everything is restored but the
        random states of the ranks.
        """
        self.onload()
        step = self._saving.load(Path(path))
        if step is not None:
            self._schedule_step = step
        self.step_count += 1

    # --- memory --------------------------------------------------------------------------------------------------

    def offload(self, *parts: Part) -> None:
        """See `TrainEngine`. On the CPU, host memory is the device: nothing moves."""
        if self._device.type == "cpu":
            return
        for part in parts or _PARTS:
            if part in self._offloaded:
                continue
            if part == "params":
                self._offloaded[part] = [Offloaded(p.data for module in self.modules for p in module.parameters())]
                if self._optimization is not None:
                    self._offloaded[part].append(Offloaded(self._optimization.gradient_buffers(), keep=False))
            else:
                self._offloaded[part] = [Offloaded(self._optimization.states())] if self._optimization else []
        torch.cuda.empty_cache()  # others on this GPU (rollout engines) need the memory

    def onload(self, *parts: Part) -> None:
        for part in parts or _PARTS:
            for offloaded in self._offloaded.pop(part, []):
                offloaded.restore()

    def close(self) -> None:
        """See `TrainEngine`; a later engine of this process may then have another layout."""
        layouts.release(self)


@contextmanager
def _training(modules: Sequence[nn.Module], recompute: bool) -> Iterator[None]:
    """Let layers recompute activations, which they do in training mode only; there is no dropout."""
    for module in modules if recompute else ():
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()
