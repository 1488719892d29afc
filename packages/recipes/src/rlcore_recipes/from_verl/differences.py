"""What no single key of verl says: settings of rlcore that are always written, and differences of behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlcore_recipes.divisors import nearest_divisors
from rlcore_recipes.from_verl.keys.supervised import conversations
from rlcore_recipes.from_verl.keys.trainer import TRACKERS
from rlcore_recipes.from_verl.values import as_list
from rlcore_recipes.from_verl.view import ACTOR, ROLLOUT, VerlView


def fixed_settings(verl: VerlView) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield settings that follow from verl itself, each with its reason."""
    if verl.supervised:
        yield {"trainer.val_before_train": False}, "verl's SFT validates first after trainer.test_freq steps"
        if not conversations(verl):
            yield {"data.apply_chat_template": "always"}, "verl takes a prompt as a user message"
        return
    yield {"data.ground_truth_key": "reward_model.ground_truth"}, "the column of verl's data files"
    if verl.get("custom_reward_function.path") is None:
        yield {"reward.name": "data_source"}, "verl's default scores by data_source"
    if verl.recipe == "dapo" and not verl.flag("reward_model.reward_kwargs.overlong_buffer_cfg.enable"):
        yield {"algorithm.overlong": None}, "off unless overlong_buffer_cfg.enable"
    if verl.asynchronous and not verl.any_below("async_training"):
        yield {"async.max_staleness": 1}, f"{verl.entry} trains one step off"


def differences(verl: VerlView) -> Iterator[str]:
    """Yield the differences that remain, each as a sentence."""
    yield from _sizes(verl)
    if verl.supervised:
        return
    yield from _validation(verl)
    yield from _rewards(verl)
    yield from _engines(verl)
    if verl.get("trainer.resume_mode") == "disable":
        yield "trainer.resume=never refuses a folder that holds another run, which verl overwrites"


def _sizes(verl: VerlView) -> Iterator[str]:
    if verl.get("trainer.total_training_steps") is not None and verl.given("trainer.total_epochs"):
        yield (
            "verl ends at trainer.total_training_steps or after trainer.total_epochs, whichever is first; "
            "trainer.total_steps alone decides here"
        )
    if verl.supervised:
        return
    batch, mini = verl.batch, verl.mini_batch
    if mini > 0 and batch % mini:
        near = nearest_divisors(batch, mini)
        yield (
            f"ppo_mini_batch_size={mini} does not divide train_batch_size={batch}: verl's FSDP workers up to 0.6 train "
            f"the remaining {batch % mini} prompts as a smaller mini-batch, later versions stop at the first update. "
            f"rlcore refuses it: the nearest valid values of actor.mini_batch_size are {' and '.join(map(str, near))}"
        )
    constant = {
        "lr_warmup_steps": (None, -1, 0),
        "lr_warmup_steps_ratio": (None, 0),
        "lr_scheduler_type": ("constant",),
    }
    changes = any(verl.get(f"{ACTOR}.optim.{name}") not in values for name, values in constant.items())
    if changes and verl.updates() > 1:
        yield (
            f"a step makes {verl.updates()} optimizer steps: verl changes the learning rate once a step, rlcore at "
            "every optimizer step"
        )


def _validation(verl: VerlView) -> Iterator[str]:
    if verl.flag("trainer.val_before_train") and verl.whole("trainer.test_freq") <= 0:
        yield "with test_freq=-1 verl still validates once before training (val_before_train); rlcore does not validate"
    if verl.given(f"{ROLLOUT}.val_kwargs.temperature") and not verl.given(f"{ROLLOUT}.val_kwargs.do_sample"):
        yield (
            "val_kwargs.temperature without do_sample: verl's rollout mode sync generates greedily, its mode async "
            "samples, as rlcore does"
        )


def _rewards(verl: VerlView) -> Iterator[str]:
    if verl.get("custom_reward_function.path") is None and not verl.flag("reward_model.enable"):
        yield (
            "math answers are compared by math-verify, as mathematical objects, where verl compares their text; "
            "those of gsm8k as numbers"
        )
    if verl.flag("reward_model.enable"):
        yield (
            "verl takes the reward model's score alone; rlcore adds it to reward's: give a function that returns 0 "
            "(reward.path) for the same"
        )
    if verl.recipe == "dapo":
        yield (
            "verl stops if max_num_gen_batches rounds do not fill a batch; rlcore fills it with dropped groups "
            "(algorithm.dynamic_sampling.max_generations)"
        )


def _engines(verl: VerlView) -> Iterator[str]:
    yield "weight decay leaves biases and norms out, which verl decays too"
    if verl.rollout_engine == "http":
        yield "a text-generation-inference server is used by its URL: set rollout.http.urls, and for training a reload"
    if verl.get(f"{ACTOR}.loss_agg_mode") == "seq-mean-token-sum-norm":
        yield (
            "verl sums over the sequences of a micro-batch and averages over micro-batches with "
            "seq-mean-token-sum-norm; rlcore takes the mean over the sequences of the mini-batch, which verl's loss is "
            "sequences-per-micro-batch times as large as"
        )
    elif not verl.flag(f"{ACTOR}.use_dynamic_bsz"):
        yield (
            "verl up to 0.6 averages losses over micro-batches, so that they depend on the micro-batch size; rlcore "
            "and later versions average over the whole mini-batch"
        )
    value = verl.get("trainer.logger")
    others = [str(name) for name in as_list(value) if name not in (*TRACKERS, "file")]
    if others and isinstance(value, list):
        yield f"no tracker for {', '.join(others)}; metrics.jsonl in trainer.out_dir has all metrics"
