"""``reward_model.*``, ``custom_reward_function.*`` and ``reward.*``: scores."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.from_verl.keys.entries import Key, NoEquivalent, NothingToSet, Several, already, key, without
from rlcore_recipes.from_verl.values import flag, number, whole
from rlcore_recipes.from_verl.view import VerlView

FUNCTION = "custom_reward_function"
BUFFER = "reward_model.reward_kwargs.overlong_buffer_cfg"
MANAGERS = ("naive", "dapo", "prime", "batch", "register", "rate_limited", "remote")
SERVED = "the reward model runs in the training engine, not in a server"
ENABLED = "reward_model.enable"
MANAGER = "a reward manager is code of verl: give its function as reward.path"
SANDBOX = "code is not run in a remote sandbox: give a reward function that calls it (reward.path)"


def function(value: Any, verl: VerlView) -> str:
    """Return the reward function as ``file.py:function``."""
    path = verl.get(f"{FUNCTION}.path")
    if path is None:
        raise NothingToSet("without a path the score goes by data_source")
    return f"{path}:{verl.get(f'{FUNCTION}.name')}"


def argument(value: Any, verl: VerlView) -> Any:
    """Return one argument of the reward function."""
    if verl.get(f"{FUNCTION}.path") is None:
        raise NothingToSet("there is no custom_reward_function.path")
    return value


def manager(value: Any, verl: VerlView) -> Any:
    """Check the reward manager: rlcore scores samples one by one, in parallel."""
    if value is None or str(value) in MANAGERS:
        raise NothingToSet("samples are scored one by one, many at a time, as soon as they are finished")
    raise NoEquivalent(MANAGER)


def overlong(value: Any, verl: VerlView) -> Several:
    """Return the penalty on long completions."""
    if not verl.flag(f"{BUFFER}.enable"):
        return Several({"algorithm.overlong": None})
    return Several(
        {
            "algorithm.overlong.buffer": verl.whole(f"{BUFFER}.len"),
            "algorithm.overlong.factor": float(
                number(verl.get(f"{BUFFER}.penalty_factor"), f"{BUFFER}.penalty_factor")
            ),
        }
    )


def overlong_part(value: Any, verl: VerlView) -> Several:
    """Return the penalty, of which ``value`` is a part."""
    if not verl.flag(f"{BUFFER}.enable"):
        raise NothingToSet("the penalty on long completions is off")
    return overlong(value, verl)


def longest(value: Any, verl: VerlView) -> Any:
    """Check the length that the penalty counts from."""
    if value is None or whole(value, "max_resp_len") == verl.whole("data.max_response_length"):
        raise NothingToSet("the penalty counts from data.max_response_length")
    raise NoEquivalent("the penalty counts from data.max_response_length")


def enabled(value: Any, verl: VerlView) -> Several:
    """Return the reward model's folder, if it takes part."""
    if not flag(value):
        raise NothingToSet("there is no reward model")
    if verl.get("reward_model.model.path") is None:
        raise NoEquivalent("name the model: reward_model.model.path")
    return Several({"reward_model.model.path": verl.get("reward_model.model.path")})


def scorer(value: Any, verl: VerlView) -> Several:
    """Return the reward model's folder, unless it is off."""
    if not verl.flag("reward_model.enable"):
        raise NothingToSet("verl reads it with reward_model.enable=True only")
    return Several({"reward_model.model.path": value})


def trusted(value: Any, verl: VerlView) -> bool:
    """Return whether the reward model's code is run."""
    if not verl.flag("reward_model.enable"):
        raise NothingToSet("verl reads it with reward_model.enable=True only")
    return flag(value)


def scorer_offload(value: Any, verl: VerlView) -> bool:
    """Return whether the reward model is moved to host memory."""
    return trusted(value, verl)


def scorer_tokens(value: Any, verl: VerlView) -> int:
    """Return the token budget of the reward model."""
    trusted(True, verl)
    return max(whole(value, "micro_batch_size_per_gpu"), 1) * verl.longest_sequence


KEYS: tuple[Key, ...] = (
    key(f"{FUNCTION}.path", "reward.path", function, old=("reward.custom_reward_function.path",)),
    key(
        f"{FUNCTION}.name",
        "reward.path",
        function,
        default="compute_score",
        old=("reward.custom_reward_function.name",),
        meaning="file.py:function",
    ),
    key(
        f"{FUNCTION}.reward_kwargs.*",
        "reward.function.kwargs.*",
        argument,
        old=("reward.custom_reward_function.reward_kwargs.*",),
    ),
    key(
        "reward_model.reward_manager",
        (),
        manager,
        old=("reward.reward_manager.name", "reward_manager.name"),
        meaning="nothing to set: samples are scored one by one, in parallel",
    ),
    key(
        f"{BUFFER}.enable",
        ("algorithm.overlong", "algorithm.overlong.buffer", "algorithm.overlong.factor"),
        overlong,
        default=False,
        meaning="False: null",
        old=("reward_model.overlong_buffer.enable", "reward.reward_kwargs.overlong_buffer_cfg.enable"),
    ),
    key(
        f"{BUFFER}.len",
        "algorithm.overlong.buffer",
        overlong_part,
        default=4096,
        old=("reward_model.overlong_buffer.len", "reward.reward_kwargs.overlong_buffer_cfg.len"),
    ),
    key(
        f"{BUFFER}.penalty_factor",
        "algorithm.overlong.factor",
        overlong_part,
        default=1.0,
        old=("reward_model.overlong_buffer.penalty_factor", "reward.reward_kwargs.overlong_buffer_cfg.penalty_factor"),
    ),
    already(
        f"{BUFFER}.log",
        "the score before the penalty is a metric",
        old=("reward_model.overlong_buffer.log", "reward.reward_kwargs.overlong_buffer_cfg.log"),
    ),
    key(
        "reward_model.reward_kwargs.max_resp_len",
        (),
        longest,
        old=("reward.reward_kwargs.max_resp_len",),
        meaning="nothing to set: data.max_response_length",
    ),
    key("reward_model.num_workers", "reward.workers", old=("reward.num_workers", "reward_model.num_examine_workers")),
    key("reward_model.enable", "reward_model.model.path", enabled, old=("reward.reward_model.enable",), default=False),
    key("reward_model.model.path", "reward_model.model.path", scorer, old=("reward.reward_model.model_path",)),
    key("reward_model.model.trust_remote_code", "reward_model.model.trust_remote_code", trusted),
    key("reward_model.model.fsdp_config.param_offload", "reward_model.offload", scorer_offload),
    key(
        "reward_model.micro_batch_size_per_gpu",
        "reward_model.max_tokens_per_micro_batch",
        scorer_tokens,
        meaning="times the longest sequence",
    ),
    already("reward_model.model.use_remove_padding", "sequences are always packed without padding"),
    already("reward_model.model.use_fused_kernels", "kernels change the speed, not the result"),
    already("reward_model.launch_reward_fn_async", "samples are scored while others are generated"),
    already("reward_model.use_reward_loop", "samples are scored while others are generated"),
    already("reward_model.use_dynamic_bsz", "micro-batches always follow a token budget"),
    already("reward_model.strategy", "the reward model uses the actor's engine"),
    without(
        "reward_model.model.input_tokenizer",
        "the model reads the policy's tokens: both need one tokenizer",
        switch=ENABLED,
    ),
    without("reward_model.rollout.*", SERVED, switch=ENABLED, old=("reward.reward_model.rollout.*",)),
    *(
        without(f"{section}.*", SANDBOX, switch=f"{section}.url")
        for section in ("reward_model.sandbox_fusion", "reward.sandbox_fusion", "sandbox_fusion")
    ),
    without(
        "reward_model.reward_kwargs.*",
        "give a reward function with arguments: reward.function.kwargs",
        old=("reward.reward_kwargs.*",),
    ),
    without(
        "reward_model.enable_resource_pool",
        "place the role: controller.placement.reward_model",
        switch=ENABLED,
        old=("reward.reward_model.enable_resource_pool",),
    ),
    without(
        "reward_model.n_gpus_per_node",
        "place the role: controller.placement.reward_model",
        switch=ENABLED,
        old=("reward.reward_model.n_gpus_per_node",),
    ),
    without(
        "reward_model.nnodes",
        "place the role: controller.placement.reward_model",
        switch=ENABLED,
        old=("reward.reward_model.nnodes",),
    ),
    without(
        "reward_model.*",
        "rlcore's reward model is a sequence classifier in the training engine",
        switch=ENABLED,
        old=("reward.reward_model.*",),
    ),
    without("reward.compute_score_kwargs.*", "verl's scores have no arguments here: give a function (reward.path)"),
    *(
        entry
        for section in ("reward_manager", "reward.reward_manager")
        for entry in (
            without(f"{section}.source", MANAGER, off=("register",)),
            without(f"{section}.*", MANAGER, switch=f"{section}.source", on=("importlib",)),
        )
    ),
    without("reward_model.reward_loop_source", MANAGER, off=("register",)),
    without("reward_model.reward_loop_module_path", MANAGER),
    without("reward_model.reward_loop_class_name", MANAGER),
)
