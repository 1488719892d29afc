"""The model of this process: one `PackedGPT` per chunk of layers, empty until weights are loaded.

Parameters have the names of megatron-core's `GPTModel` with its local layers (`rlcore_megatron.spec`). Parameters that
are divided over tensor-parallel ranks are marked by ``tensor_model_parallel`` and ``partition_dim``. The vocabulary is
padded to a multiple of the tensor-parallel size; the padding's rows of the embedding and of the output layer are never
read. A value or score head is ``output_layer.weight`` ``[1, hidden]`` and, where it has one, ``output_layer.bias``
``[1]``, full on every tensor-parallel rank of the last stage.

Importing this module imports megatron-core: on the CPU `rlcore_megatron.cpu_emulation.install` must come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from rlcore.engines import ForwardRequest, OutputLayer
from rlcore.engines.settings import Head
from rlcore.errors import EngineError
from rlcore_kit.training.logprob_head import LogitsRule, VocabularyShard
from rlcore_kit.training.policy_outputs import PolicyHead, policy_outputs
from rlcore_megatron.adapters import add_adapters
from rlcore_megatron.packing import PackedRow
from rlcore_megatron.parallel import Parallel
from rlcore_megatron.settings import MegatronSettings
from rlcore_megatron.spec import block_spec


class ValueHead(nn.Module):
    """A head with one or a few numbers per token. New weights are small, so that values start near zero."""

    def __init__(self, hidden: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, hidden, generator=torch.Generator().manual_seed(seed)) / (hidden + 1)
        self.weight = nn.Parameter(weight.to(dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype)) if bias else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return ``[P, outputs]`` fp32 for states ``[P, hidden]``."""
        values = states.float() @ self.weight.float().T
        return values if self.bias is None else values + self.bias.float()


class PackedGPT(GPTModel):  # type: ignore[misc]
    """`GPTModel` on packed rows, whose last stage returns numbers per token instead of logits.

    Attributes:
        head: "policy", "value" or "score".
        vocabulary: number of tokens, without padding.
        logits_chunk: see `MegatronSettings`.
        others: this rank's rows of output layers of other models (`rlcore.engines.TrainEngine.hold_output_layer`).
    """

    head: Head
    vocabulary: int
    logits_chunk: int | None
    others: Mapping[str, OutputLayer]

    def forward(self, row: PackedRow, request: ForwardRequest) -> torch.Tensor:
        """Return hidden states ``[T', 1, hidden]``, on the last stage the requested outputs ``[P, width]`` fp32."""
        hidden = super().forward(row.tokens, None, None, packed_seq_params=row.attention)
        return self._outputs(hidden, row, request) if self.post_process else hidden

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the states instead of logits: `forward` applies the head in chunks."""
        return hidden_states

    def _outputs(self, hidden: torch.Tensor, row: PackedRow, request: ForwardRequest) -> torch.Tensor:
        policy = self.head == "policy"
        if self.config.sequence_parallel:
            # The gradient of the states differs between ranks for a policy; it is the same for a scalar head.
            hidden = gather_from_sequence_parallel_region(hidden, policy, group=self.tp_group)
        elif policy:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        states = hidden[:, 0].index_select(0, row.rows)
        if not policy:
            return self.output_layer(states)  # type: ignore[no-any-return]
        outputs = policy_outputs(states, self.policy_head(), row.targets, row.inputs, request)
        return torch.cat([value.float() if value.dim() > 1 else value[:, None] for value in outputs.values()], -1)

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output layer, with padding; on the last stage."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight  # type: ignore[no-any-return]

    @property
    def shard(self) -> VocabularyShard | None:
        """This rank's part of the vocabulary; None if it has all."""
        if self.tp_group.size() == 1:
            return None
        size = -(-self.vocabulary // self.tp_group.size())
        return VocabularyShard(self.tp_group.rank() * size, size, self.tp_group)

    def policy_head(self) -> PolicyHead:
        """Return this rank's rows of the output layer, without padding; on the last stage."""
        head = PolicyHead(self.output_weight, None, LogitsRule(), self.logits_chunk, self.shard, self.others)
        padded = head.rows_within(self.vocabulary) < len(head.weight)
        return head.within(self.vocabulary) if padded else head


def transformer_config(
    fields: dict[str, Any], settings: MegatronSettings, device: torch.device, dtype: torch.dtype
) -> TransformerConfig:
    """Build Megatron's configuration from the ``fields`` of the model, the layout, and what the engine depends on.

    Raises:
        EngineError: Megatron rejects the combination.
    """
    given: dict[str, Any] = {
        "attention_softmax_in_fp32": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        **fields,
        **settings.transformer,
    }
    if settings.virtual_pipeline > 1:
        # megatron-core 0.16.1 mixes up both directions between two stages if it sends them in one batch
        given = {"overlap_p2p_comm": True, "batch_p2p_comm": False} | given
    if settings.recompute == "full":
        given = {"recompute_method": "uniform", "recompute_num_layers": 1} | given
    given |= {
        "tensor_model_parallel_size": settings.tensor_parallel,
        "pipeline_model_parallel_size": settings.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": settings.virtual_pipeline if settings.virtual_pipeline > 1 else None,
        "context_parallel_size": settings.context_parallel,
        "expert_model_parallel_size": settings.expert_parallel,
        "expert_tensor_parallel_size": settings.expert_tensor_parallel or settings.tensor_parallel,
        "sequence_parallel": settings.sequence_parallel,
        "recompute_granularity": None if settings.recompute == "none" else settings.recompute,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_aux_loss_coeff": 0.0,
        "variable_seq_lengths": True,  # packed rows differ in length
        "calculate_per_token_loss": True,  # losses of the objective are summed, never averaged
        "use_cpu_initialization": device.type == "cpu",
        "perform_initialization": False,
    }
    try:
        return TransformerConfig(**given)
    except (ValueError, AssertionError, TypeError) as error:
        raise EngineError(f"megatron-core rejects the model with megatron.transformer: {error}") from error


def build_modules(
    hf_config: Any,
    family: Any,
    settings: MegatronSettings,
    parallel: Parallel,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head: Head = "policy",
    head_bias: bool = False,
    seed: int = 0,
) -> list[PackedGPT]:
    """Build this process's chunks, in the order of the interleaved schedule (one chunk without it).

    Args:
        hf_config: configuration of transformers; its ``num_labels`` is the number of outputs of a value or score head.
        head_bias: whether such a head has a bias.
        seed: initialises the weights of a scalar head, and adapters.
    """
    config = transformer_config(family.transformer_config(hf_config), settings, device, dtype)
    arguments = dict(family.model_arguments(hf_config))
    vocabulary = arguments.pop("vocab_size")
    if head != "policy":
        arguments["share_embeddings_and_output_weights"] = False
    fused = device.type == "cuda" and settings.lora is None
    implementation = settings.implementation or ("transformer_engine" if fused else "local")
    chunks = []
    for number in range(parallel.vpp):
        stage = number if parallel.vpp > 1 else None
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        model = PackedGPT(
            config,
            block_spec(config, implementation, stage, adapted=settings.lora is not None),
            vocab_size=-(-vocabulary // parallel.tp) * parallel.tp,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=last,
            vp_stage=stage,
            **arguments,
        )
        model.head, model.vocabulary, model.logits_chunk, model.others = head, vocabulary, settings.logits_chunk, {}
        if last and head != "policy":
            model.output_layer = ValueHead(config.hidden_size, hf_config.num_labels, head_bias, dtype, seed)
        _mark_divided(model)
        chunks.append(model.to(device).eval())
    if settings.lora is not None:
        add_adapters(chunks, family, hf_config, settings.lora, parallel, seed)
    return chunks


def _mark_divided(model: nn.Module) -> None:
    """Mark the weights that are divided over ranks, which Megatron does only where it initialises them.

    Without the mark the gradient norm counts a weight once, as if all ranks had the same one.
    """
    for module in model.modules():
        dimension = 1 if isinstance(module, RowParallelLinear) else 0
        divided = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        if divided and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)
