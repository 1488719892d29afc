"""``actor_rollout_ref.rollout.*``: generation."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.from_verl.keys.engines import dtype, quantisation_aware
from rlcore_recipes.from_verl.keys.entries import (
    Convert,
    Key,
    NoEquivalent,
    NothingToSet,
    Several,
    already,
    already_if,
    key,
    without,
)
from rlcore_recipes.from_verl.values import flag, number, whole
from rlcore_recipes.from_verl.view import VerlView

ROLLOUT = "actor_rollout_ref.rollout"
ONE_BUDGET = "log-probs are computed with the policy's token budget, on which they do not depend"
TOOLS = "several turns and tools are written as an environment, or run as an agent program: set rollout.environment"
TRACE = "rlcore's profile is a trace of all processes: trace=true"
GENERATED = "completions of earlier runs are not read in place of new ones"
ONE_TURN = "a completion is one turn without an environment"


def engine(value: Any, verl: VerlView) -> Several:
    """Return the rollout engine."""
    if verl.rollout_engine is None:
        raise NoEquivalent("the rollout engines are vllm, sglang, inline and http; this run has inline")
    found = Several({"rollout.engine": verl.rollout_engine})
    if verl.rollout_engine == "http":
        found["rollout.http.protocol"] = "tgi"
    return found


def by_engine(**names: str | Convert | None) -> Convert:
    """Return the conversion of an engine's setting: by engine, the key that takes the value."""

    def convert(value: Any, verl: VerlView) -> Any:

        name = names.get(verl.rollout_engine or "")
        if value is None:
            raise NothingToSet("null leaves it to the engine")
        if name is None:
            raise NoEquivalent(f"the rollout engine {verl.rollout_engine} has no such setting")
        if callable(name):
            return name(value, verl)
        return Several({f"rollout.{verl.rollout_engine}.{name}": value})

    return convert


def engine_keys(**names: str) -> tuple[str, ...]:
    """Return the keys that `by_engine` may set."""
    return tuple(f"rollout.{engine_name}.{name}" for engine_name, name in names.items())


def eager(value: Any, verl: VerlView) -> Any:
    """Return SGLang's switch for the same: CUDA graphs off."""

    return Several({"rollout.sglang.args.disable_cuda_graph": flag(value)})


def engine_dtype(value: Any, verl: VerlView) -> Any:
    """Return the engine's precision."""

    name = "float16" if value in ("float16", "half", "fp16") else dtype(value, verl)
    return Several({f"rollout.{verl.rollout_engine}.dtype": name})


def tensor_parallel(value: Any, verl: VerlView) -> Any:
    """Return the GPUs of an engine; on the policy's GPUs every process has an engine on its GPU."""

    size, name = whole(value, "tensor_model_parallel_size"), verl.rollout_engine
    target = {"vllm": "rollout.vllm.tensor_parallel_size", "sglang": "rollout.sglang.tp_size"}.get(name or "")
    if target is None:
        raise NothingToSet(f"the rollout engine {name} is on one GPU")
    if size > 1 and not verl.asynchronous:
        raise NoEquivalent(
            "a rollout that shares the policy's GPUs has one engine per GPU, with the same completions; for a model "
            f"that needs {size} GPUs to generate, give the rollout a separate pool (controller.placement.rollout)"
        )
    return Several({target: size})


def load_format(value: Any, verl: VerlView) -> Any:
    """Return how the engine reads the model's files before the first update of weights."""

    if verl.rollout_engine != "vllm":
        raise NothingToSet("the engine reads the model's files")
    dummy = str(value).startswith("dummy") and str(value) != "dummy_hf"
    known = {"safetensors": "auto", "hf": "auto", "auto": "auto", "megatron": "auto", "dtensor": "auto"}
    return Several({"rollout.vllm.load_format": "dummy" if dummy else known.get(str(value), "auto")})


def top_k(value: Any, verl: VerlView) -> int:
    """Return the number of best tokens, of which verl's -1 is all."""
    return max(whole(value, "top_k"), 0)


def sampled(value: Any, verl: VerlView) -> Any:
    """Check that training samples."""
    if not flag(value):
        raise NoEquivalent("training always samples: greedy completions of a prompt are all alike")
    raise NothingToSet("training always samples")


def validation(name: str, convert: Convert) -> Convert:
    """Return the conversion of sampling in validation; without ``do_sample`` verl generates one greedy completion."""

    def checked(value: Any, verl: VerlView) -> Any:
        if verl.given(f"{ROLLOUT}.val_kwargs.do_sample") and not verl.flag(f"{ROLLOUT}.val_kwargs.do_sample"):
            raise NothingToSet("with val_kwargs.do_sample=False validation is greedy")
        return convert(value, verl)

    return checked


def greedy(value: Any, verl: VerlView) -> Any:
    """Return the temperature of validation that ``do_sample`` asks for."""
    return float(number(verl.get(f"{ROLLOUT}.val_kwargs.temperature"), "temperature")) if flag(value) else 0.0


def plain(value: Any, verl: VerlView) -> Any:
    """Return ``value``."""
    return value


def bucket(value: Any, verl: VerlView) -> int:
    """Return the size of a bucket of weights in MiB."""
    return whole(value, "update_weights_bucket_megabytes")


def engine_args(name: str) -> Convert:
    """Return the conversion of arguments of the engine ``name`` that rlcore does not know."""

    def convert(value: Any, verl: VerlView) -> Any:
        if verl.rollout_engine != name:
            raise NothingToSet(f"the rollout engine is {verl.rollout_engine}")
        return value

    return convert


def vision_only(value: Any, verl: VerlView) -> Any:
    """Report a setting of vision models."""
    raise NothingToSet("vision models are not supported, and other models have no such cache")


_VAL = f"{ROLLOUT}.val_kwargs"
_RUNNING = {"vllm": "max_num_seqs", "sglang": "max_running_requests", "inline": "max_running"}
_MEMORY = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static", "inline": "kv_cache_fraction"}
_BATCHED = {"vllm": "max_num_batched_tokens", "sglang": "args.chunked_prefill_size", "inline": "prefill_tokens"}

KEYS: tuple[Key, ...] = (
    key(
        f"{ROLLOUT}.name",
        ("rollout.engine", "rollout.http.protocol"),
        engine,
        differs="vllm",
        meaning="hf: inline; tgi: http",
    ),
    key(f"{ROLLOUT}.n", "rollout.n", differs=1, meaning="completions of a prompt in both"),
    key(f"{ROLLOUT}.temperature", "rollout.temperature", default=1.0),
    key(f"{ROLLOUT}.top_k", "rollout.top_k", top_k, default=-1, meaning="-1: 0, all"),
    key(f"{ROLLOUT}.top_p", "rollout.top_p", default=1),
    already_if(f"{ROLLOUT}.do_sample", (True,), "training always samples", "training always samples", default=True),
    key(f"{_VAL}.n", "rollout.validation.n", validation("n", plain), default=1),
    key(f"{_VAL}.temperature", "rollout.validation.temperature", validation("temperature", plain), default=0),
    key(f"{_VAL}.top_k", "rollout.validation.top_k", validation("top_k", top_k), default=-1, meaning="-1: 0, all"),
    key(f"{_VAL}.top_p", "rollout.validation.top_p", validation("top_p", plain), default=1.0),
    key(f"{_VAL}.do_sample", "rollout.validation.temperature", greedy, default=False, meaning="False: temperature 0"),
    key(
        f"{ROLLOUT}.gpu_memory_utilization",
        engine_keys(**_MEMORY),
        by_engine(**_MEMORY),
        differs=0.5,
        meaning="in vLLM of the whole GPU, in SGLang of its static memory",
    ),
    key(
        f"{ROLLOUT}.tensor_model_parallel_size",
        ("rollout.vllm.tensor_parallel_size", "rollout.sglang.tp_size"),
        tensor_parallel,
        default=2,
        meaning="on a separate pool; on the policy's GPUs there is one engine per GPU",
    ),
    key(f"{ROLLOUT}.max_num_seqs", engine_keys(**_RUNNING), by_engine(**_RUNNING), default=256),
    key(f"{ROLLOUT}.max_num_batched_tokens", engine_keys(**_BATCHED), by_engine(**_BATCHED), default=8192),
    key(
        f"{ROLLOUT}.enforce_eager",
        ("rollout.vllm.enforce_eager", "rollout.sglang.args.disable_cuda_graph"),
        by_engine(vllm="enforce_eager", sglang=eager),
        default=False,
    ),
    key(
        f"{ROLLOUT}.enable_chunked_prefill",
        "rollout.vllm.args.enable_chunked_prefill",
        by_engine(vllm="args.enable_chunked_prefill"),
        default=True,
    ),
    key(
        f"{ROLLOUT}.enable_prefix_caching",
        "rollout.vllm.enable_prefix_caching",
        by_engine(vllm="enable_prefix_caching"),
    ),
    key(f"{ROLLOUT}.load_format", "rollout.vllm.load_format", load_format),
    key(
        f"{ROLLOUT}.dtype",
        ("rollout.vllm.dtype", "rollout.sglang.dtype"),
        by_engine(vllm=engine_dtype, sglang=engine_dtype),
    ),
    key(f"{ROLLOUT}.free_cache_engine", "rollout.free_memory", default=True),
    key(f"{ROLLOUT}.enable_sleep_mode", "rollout.free_memory", default=True),
    key(f"{ROLLOUT}.seed", "seed"),
    key(f"{ROLLOUT}.quantization", "rollout.vllm.args.quantization", by_engine(vllm="args.quantization")),
    key(
        f"{ROLLOUT}.cudagraph_capture_sizes",
        "rollout.vllm.args.cudagraph_capture_sizes",
        by_engine(vllm="args.cudagraph_capture_sizes"),
    ),
    key(f"{ROLLOUT}.engine_kwargs.vllm.disable_mm_preprocessor_cache", (), vision_only, meaning="vision models only"),
    key(f"{ROLLOUT}.engine_kwargs.vllm.*", "rollout.vllm.args.*", engine_args("vllm")),
    key(f"{ROLLOUT}.engine_kwargs.sglang.attention_backend", "rollout.sglang.attention_backend", engine_args("sglang")),
    key(f"{ROLLOUT}.engine_kwargs.sglang.*", "rollout.sglang.args.*", engine_args("sglang")),
    without(f"{ROLLOUT}.engine_kwargs.trtllm.*", "TensorRT-LLM is not among the rollout engines"),
    key(
        f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes",
        "weight_sync.bucket_mb",
        bucket,
        old=(f"{ROLLOUT}.update_weights_bucket_megabytes",),
    ),
    already(f"{ROLLOUT}.checkpoint_engine.backend", "weight_sync.transport takes what connects the processes"),
    already(f"{ROLLOUT}.mode", "requests are always independent of each other, as in verl's async mode"),
    already(f"{ROLLOUT}.prompt_length", "it is data.max_prompt_length"),
    already(f"{ROLLOUT}.response_length", "it is data.max_response_length"),
    already(f"{ROLLOUT}.max_model_len", "it is data.max_prompt_length + data.max_response_length"),
    already(f"{ROLLOUT}.calculate_log_probs", "the engine always reports log-probs"),
    already(f"{ROLLOUT}.logprobs_mode", "log-probs are those at the sampling temperature"),
    already(f"{ROLLOUT}.log_prob_micro_batch_size", ONE_BUDGET),
    already(f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", ONE_BUDGET),
    already(f"{ROLLOUT}.log_prob_use_dynamic_bsz", ONE_BUDGET),
    already(f"{ROLLOUT}.log_prob_max_token_len_per_gpu", ONE_BUDGET),
    already(f"{ROLLOUT}.layered_summon", "weights are always handed over layer by layer"),
    already(f"{ROLLOUT}.multi_stage_wake_up", "weights and key-value cache return in two stages"),
    already(f"{ROLLOUT}.disable_log_stats", "the engine's own log is off"),
    already(f"{ROLLOUT}.skip_tokenizer_init", "the engine gets and returns token ids"),
    already(f"{ROLLOUT}.scheduling_policy", "requests are answered in the order of their start"),
    already(f"{ROLLOUT}.micro_batch_size", "the engine batches continuously"),
    already(f"{ROLLOUT}.agent.num_workers", "requests are made by one event loop"),
    already_if(f"{ROLLOUT}.agent.default_agent_loop", ("single_turn_agent",), ONE_TURN, TOOLS),
    already_if(f"{ROLLOUT}.multi_turn.enable", (False,), ONE_TURN, TOOLS, default=False),
    already_if(
        f"{ROLLOUT}.ignore_eos", (False,), "a completion ends at an end token", "completions end at an end token"
    ),
    already_if(
        f"{ROLLOUT}.full_determinism",
        (False,),
        "batches may change the last bits",
        "only rollout.inline.batch_invariant=true makes completions independent of the batch",
    ),
    already_if(
        f"{ROLLOUT}.over_sample_rate",
        (0, None),
        "exactly the needed prompts are started",
        "a step waits for all its groups, or trains asynchronously (async.max_staleness)",
    ),
    already_if(
        f"{ROLLOUT}.data_parallel_size",
        (1, None),
        "each engine is one replica",
        "the processes of the rollout's pool are its replicas",
    ),
    already_if(
        f"{ROLLOUT}.pipeline_model_parallel_size",
        (1, None),
        "layers are not divided in stages",
        "rollout engines divide layers by tensor parallelism only",
    ),
    already_if(
        f"{ROLLOUT}.expert_parallel_size",
        (1, None),
        "experts are not divided",
        "set the engine's own argument: rollout.vllm.args.enable_expert_parallel or rollout.sglang.args.ep_size",
    ),
    already_if(
        f"{ROLLOUT}.enable_rollout_routing_replay",
        (False,),
        "routes are not replayed",
        "routes of experts are not replayed in training",
    ),
    without(f"{ROLLOUT}.multi_turn.*", TOOLS, switch=f"{ROLLOUT}.multi_turn.enable"),
    without(f"{ROLLOUT}.agent.*", TOOLS),
    without(
        f"{ROLLOUT}.trace.*",
        "rollouts can be logged: trainer.log_val_generations, and the trackers' tables",
        switch=f"{ROLLOUT}.trace.backend",
    ),
    without(f"{ROLLOUT}.prometheus.*", "metrics go to the trackers", switch=f"{ROLLOUT}.prometheus.enable"),
    without(f"{ROLLOUT}.profiler.*", TRACE, switch=f"{ROLLOUT}.profiler.enable"),
    without(f"{ROLLOUT}.checkpoint_engine.*", "weights travel by weight_sync.transport"),
    without(f"{ROLLOUT}.mtp.*", "multi-token prediction is not supported", switch=f"{ROLLOUT}.mtp.enable"),
    quantisation_aware(ROLLOUT),
    without(
        f"{ROLLOUT}.disaggregation.*",
        "prefill and decoding are in one engine",
        switch=f"{ROLLOUT}.disaggregation.enabled",
    ),
    without(f"{ROLLOUT}.skip_rollout", GENERATED, off=(False,)),
    without(f"{ROLLOUT}.skip_dump_dir", GENERATED, switch=f"{ROLLOUT}.skip_rollout"),
    *(
        without(f"{section}.*", GENERATED, switch=f"{section}.enable")
        for section in (f"{ROLLOUT}.skip", "skip.rollout", "skip.rollout_tq", "skip.async_rollout")
    ),
    already(
        f"{ROLLOUT}.use_preprocessed_multimodal_input", "vision models are not supported, others have no such input"
    ),
    already(f"{ROLLOUT}.cast_to_rollout_dtype", "weights get the engine's precision when they are handed over"),
    already(f"{ROLLOUT}.layer_name_map.*", "weights are handed over under their names in the model's folder"),
    without(f"{ROLLOUT}.quantization_config_file", "the engine quantises by its own argument: rollout.vllm.args"),
    without(f"{ROLLOUT}.chat_scheduler", TOOLS),
    without(f"{ROLLOUT}.use_fire_sampling", "the temperature is that of every token", off=(False,)),
    without(f"{ROLLOUT}.limit_images", "vision models are not supported"),
    without(f"{ROLLOUT}.moe_load_balance_metrics_interval", "there is no such metric"),
)
