"""``trainer.*``: the length of the run, trackers, checkpoints, and the processes that it runs in."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.from_verl.keys.entries import (
    Key,
    NoEquivalent,
    NothingToSet,
    Several,
    already,
    already_if,
    key,
    without,
)
from rlcore_recipes.from_verl.values import as_list, flag, whole
from rlcore_recipes.from_verl.view import VerlView

TRACKERS = ("console", "wandb", "tensorboard", "swanlab", "mlflow", "trackio")
TRACE = "rlcore's profile is a trace of all processes: trace=true"
POOLS = ("controller.pools", "controller.kind", "controller.address", "controller.placement")


def placement(value: Any, verl: VerlView) -> Several:
    """Return the processes of the run: one on each GPU."""
    gpu = 0 if str(verl.get("trainer.device")) == "cpu" else 1
    if verl.asynchronous:
        return _apart(verl)
    if verl.processes == 1:
        return Several({"controller.kind": "local"})
    pool = {"processes": verl.processes, "gpus_per_process": gpu}
    found = Several({"controller.kind": "ray", "controller.pools": {"default": pool}})
    if verl.whole("trainer.nnodes") > 1:
        found["controller.address"] = "auto"
    return found


def _apart(verl: VerlView) -> Several:
    """Return pools for training and for generation, each engine of which has the GPUs of its tensor parallelism."""
    rollout = "actor_rollout_ref.rollout"
    nodes, per_node = (
        verl.get(f"rollout.{name}") or verl.get(f"{rollout}.{name}") for name in ("nnodes", "n_gpus_per_node")
    )
    total = whole(nodes or 1, "rollout.nnodes") * whole(
        per_node or verl.get("trainer.n_gpus_per_node"), "rollout.n_gpus_per_node"
    )
    size = verl.whole(f"{rollout}.tensor_model_parallel_size")
    pools = {
        "train": {"processes": verl.processes, "gpus_per_process": 1},
        "generate": {"processes": max(total // size, 1), "gpus_per_process": size},
    }
    models = ["actor", *["critic"] * verl.has_critic]
    reference = verl.flag("actor_rollout_ref.actor.use_kl_loss") or verl.flag("algorithm.use_kl_in_reward")
    models += ["ref"] * (reference and not verl.actor_is_reference)
    placed = {**dict.fromkeys(models, "train"), "rollout": "generate"}
    found = Several({"controller.kind": "ray", "controller.pools": pools, "controller.placement": placed})
    if verl.whole("trainer.nnodes") + whole(nodes or 1, "rollout.nnodes") > 2:
        found["controller.address"] = "auto"
    if verl.rollout_engine == "vllm":
        found["rollout.vllm.mode"] = "process"
    return found


def trackers(value: Any, verl: VerlView) -> list[str]:
    """Return the trackers that rlcore has, and JSON lines, which every run writes."""
    wanted = [str(name) for name in as_list(value)]
    if isinstance(value, str):
        wanted = [name.strip(" '\"[]") for name in value.split(",")]
    known = [name for name in wanted if name in TRACKERS]
    if wanted and not known and wanted != ["file"]:
        raise NoEquivalent(f"the trackers are {', '.join(TRACKERS)} and jsonl")
    return [*known, "jsonl"]


def every(value: Any, verl: VerlView) -> int:
    """Return an interval in steps; in verl every number below 1 is never."""
    steps = whole(value, "an interval")
    return steps if steps > 0 else -1


def out_dir(value: Any, verl: VerlView) -> str:
    """Return the folder of the run, by default named after project and experiment as in verl."""
    names = (verl.get(f"trainer.{name}_name") for name in ("project", "experiment"))
    return str(value).replace("${trainer.project_name}/${trainer.experiment_name}", "/".join(map(str, names)))


def resume(value: Any, verl: VerlView) -> str:
    """Return which checkpoint the run continues from."""
    mode = str(verl.get("trainer.resume_mode"))
    if mode == "resume_path" and verl.get("trainer.resume_from_path"):
        return str(verl.get("trainer.resume_from_path"))
    return {"auto": "auto", "disable": "never"}.get(mode, "auto")


def resume_path(value: Any, verl: VerlView) -> str:
    """Return the checkpoint, which verl reads with ``resume_mode=resume_path`` only."""
    if verl.get("trainer.resume_mode") != "resume_path" or value in (None, "", False):
        raise NothingToSet("verl reads it with trainer.resume_mode=resume_path only")
    return resume(value, verl)


def kept(value: Any, verl: VerlView) -> int | None:
    """Return the newest checkpoints to keep; null is all in both."""
    if value is None and verl.whole("trainer.save_freq") <= 0:
        raise NothingToSet("no checkpoint is written")
    return None if value is None else max(whole(value, "checkpoints to keep"), 1)


def saved(value: Any, verl: VerlView) -> bool:
    """Return whether the final model is written as a Hugging Face folder; checkpoints always hold all else."""
    if "hf_model" in as_list(value):
        return True
    if {"model", "optimizer", "extra"} <= set(as_list(value)):
        raise NothingToSet("checkpoints hold model, optimizer and the rest of the state")
    raise NoEquivalent("checkpoints always hold model, optimizer and the rest of the state, so that a run resumes")


def previous_removed(value: Any, verl: VerlView) -> int:
    """Return 1 if verl deletes the previous checkpoint when it saves one."""
    if not flag(value):
        raise NothingToSet("trainer.max_actor_ckpt_to_keep decides")
    return 1


def critic_warmup(value: Any, verl: VerlView) -> int:
    """Return the first step that updates the policy."""
    if not verl.has_critic:
        if whole(value, "trainer.critic_warmup") <= 1:
            raise NothingToSet("there is no critic")
        raise NoEquivalent("there is no critic to warm up, and the policy is updated from the first step on")
    return whole(value, "trainer.critic_warmup")


def steps(value: Any, verl: VerlView) -> int:
    """Return the number of steps."""
    if value is None:
        raise NothingToSet("trainer.total_epochs decides")
    return whole(value, "trainer.total_training_steps")


def device(value: Any, verl: VerlView) -> Several:
    """Return where training computes."""
    if value not in ("cuda", "cpu", None):
        raise NoEquivalent("devices are cuda and cpu")
    if value in ("cuda", None):
        raise NothingToSet("a GPU is used if there is one")
    return Several({f"actor.{verl.engine}.device": "cpu"})


def shared(epochs: int, project: str, experiment: str, gpus: int) -> tuple[Key, ...]:
    """Return the keys that all of verl's trainers have, with the defaults of one of them."""
    one_per_gpu = "one process for each GPU; more than one need Ray"
    return (
        key("trainer.total_epochs", "trainer.total_epochs", differs=epochs),
        key("trainer.total_training_steps", "trainer.total_steps", steps),
        key("trainer.project_name", "trainer.project", differs=project),
        key("trainer.experiment_name", "trainer.name", differs=experiment),
        key("trainer.logger", "trainer.trackers", trackers, differs=["console", "wandb"], meaning="and jsonl, always"),
        key("trainer.n_gpus_per_node", POOLS, placement, differs=gpus, meaning=one_per_gpu),
        key("trainer.nnodes", POOLS, placement, default=1, meaning=one_per_gpu),
        key("trainer.device", "actor.fsdp.device", device, default="cuda"),
        key("trainer.save_freq", "trainer.save_freq", every, differs=-1, meaning="steps, and the last; -1: never"),
        key("trainer.test_freq", "trainer.test_freq", every, differs=-1, meaning="steps, and the last; -1: never"),
        key(
            "trainer.default_local_dir",
            "trainer.out_dir",
            out_dir,
            differs="checkpoints/${trainer.project_name}/${trainer.experiment_name}",
            meaning="checkpoints are in its folder checkpoints",
        ),
        key(
            "trainer.resume_mode",
            "trainer.resume",
            resume,
            default="auto",
            meaning="disable: never; resume_path: trainer.resume_from_path",
        ),
        key("trainer.resume_from_path", "trainer.resume", resume_path, old=("trainer.resume_path",)),
        key(
            "trainer.max_actor_ckpt_to_keep",
            "trainer.keep_checkpoints",
            kept,
            differs=None,
            old=("trainer.max_ckpt_to_keep",),
            meaning="null: all; one checkpoint holds all models",
        ),
        key("trainer.checkpoint.save_contents", "trainer.save_hf", saved, old=("checkpoint.save_contents",)),
        *_other_keys(),
    )


def _other_keys() -> tuple[Key, ...]:
    """Return the keys for which there is nothing to set, or no equivalent."""
    url = "checkpoints go to a folder or a URL (s3://, gs://, hdfs:// by fsspec): trainer.checkpoint_dir"
    saves = "a run saves when it gets SIGTERM: trainer.grace_s"
    return (
        already("trainer.balance_batch", "sequences are always divided over GPUs by their tokens"),
        already("trainer.balance_keep_minibatch", "each mini-batch is divided over GPUs by itself"),
        already("trainer.use_legacy_worker_impl", "it chooses among verl's implementations"),
        already("trainer.use_v1", "it chooses among verl's implementations"),
        already("trainer.ray_wait_register_center_timeout", "the wait for workers is controller.placement_timeout_s"),
        already("trainer.del_local_ckpt_after_load", "checkpoints are deleted by trainer.keep_checkpoints"),
        already_if("trainer.default_hdfs_dir", (None,), "checkpoints are local", url),
        already_if("trainer.esi_redundant_time", (0, None), saves, saves),
        without("trainer.profile_interval", TRACE, off=([-1, -1],)),
        without("trainer.profile_steps", TRACE),
        without("trainer.npu_profile.*", TRACE),
        without("global_profiler.*", TRACE, switch="global_profiler.steps"),
        without("profiler.*", TRACE, switch="profiler.enable"),
        already(
            "trainer.checkpoint.load_contents", "a checkpoint is read as a whole", old=("checkpoint.load_contents",)
        ),
        already("hydra.*", "the run's files are in trainer.out_dir"),
        already(
            "ray_init.*",
            "Ray's resources are those of the machine, or of controller.address",
            old=("ray_kwargs.*",),
        ),
    )


def _implementation_keys() -> tuple[Key, ...]:
    """Return the keys of verl's trainer under ``trainer.v1``: only its mode changes what is computed."""
    mode, apart = "trainer.v1.trainer_mode", ("colocate_async", "separate_async")
    pool = "give the rollout a pool and a bound: controller.placement.rollout, async.max_staleness"
    return (
        without(mode, pool, off=("sync",)),
        *(without(f"trainer.v1.{name}.*", pool, switch=mode, on=(name,)) for name in apart),
        without("trainer.v1.sampler.*", "samples are bounded by async.max_staleness", switch=mode, on=apart),
        without("trainer.v1.*", "it belongs to verl's implementation"),
    )


KEYS: tuple[Key, ...] = (
    *shared(30, "verl_examples", "gsm8k", 8),
    key("trainer.val_before_train", "trainer.val_before_train", default=True),
    key("trainer.log_val_generations", "trainer.log_val_generations", default=0),
    key(
        "trainer.critic_warmup",
        "critic.warmup_steps",
        critic_warmup,
        default=0,
        meaning="the policy is updated from this step on, in both",
    ),
    key(
        "trainer.remove_previous_ckpt_in_save",
        "trainer.keep_checkpoints",
        previous_removed,
        default=False,
        meaning="True: 1",
    ),
    already_if("trainer.val_only", (False,), "the run trains", "evaluate with `rlcore eval`"),
    already("trainer.max_critic_ckpt_to_keep", "one checkpoint holds all models"),
    without("trainer.rollout_data_dir", "trainer.log_rollouts=-1, with the tracker parquet for files"),
    without("trainer.validation_data_dir", "completions of validation are logged: trainer.log_val_generations"),
    without("trainer.n_env_gpus_per_node", "an environment is a role of rlcore-agents"),
    without(
        "trainer.n_rollout_gpus_per_node", "give the rollout a pool: controller.pools, controller.placement.rollout"
    ),
    without("trainer.checkpoint_callback_class", "nothing is called when a checkpoint is written"),
    *_implementation_keys(),
    without("transfer_queue.*", "samples travel through the executor", switch="transfer_queue.enable"),
    without("distillation.*", "distillation is not among the recipes", switch="distillation.enabled"),
)

SFT_KEYS: tuple[Key, ...] = shared(4, "gsm8k-sft", "test", 8)
