"""SFT until the model is mediocre: the stage before GRPO."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rlcore.algorithms.objectives import SFTObjectiveSettings
from rlcore.controller import LocalExecutor
from rlcore.engines import ModelSettings, RolloutEngine, sync_weights
from rlcore.errors import RlcoreError
from rlcore_recipes import sft
from rlcore_recipes.data.loader import BatchLoader
from rlcore_recipes.data.prompts import load_prompts
from rlcore_recipes.data.settings import SFTDataSettings
from rlcore_recipes.data.sft import load_sft
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.grpo import GRPOConfig
from rlcore_recipes.quickstart import settings
from rlcore_recipes.rollouts.plan import validation_plan
from rlcore_recipes.rollouts.scorer import Scorer, reward_of
from rlcore_recipes.rollouts.synchronous import roll_out_together
from rlcore_recipes.rollouts.workers import RolloutWorkers
from rlcore_recipes.run.roles import rollout_engine, train_engine
from rlcore_recipes.run.timing import Timings


def train_sft(base: Path, out: Path, config: GRPOConfig, report: Callable[[int, float, float], None]) -> int:
    """Train the model in ``base`` on worked solutions until it answers `settings.MEDIOCRE` of the problems; write it
    to ``out``.

    Args:
        config: the GRPO run that follows; its data, reward and validation sampling are used here too.
        report: called after every check with the step, the loss and the fraction of right answers.

    Returns:
        the optimizer steps made.
    """
    model = ModelSettings(path=str(base))
    tokenizer = load_tokenizer(model)
    data = SFTDataSettings(train_files=config.data.train_files, train_batch_size=settings.SFT_BATCH)
    solutions = load_sft(data, data.train_files, tokenizer)
    batches = BatchLoader(solutions, solutions.file_sizes, settings.SFT_BATCH, seed=config.seed)
    problems = load_prompts(config.data, config.data.val_files, tokenizer, settings.SFT_CHECK_PROBLEMS)
    plan, executor = validation_plan(config), LocalExecutor()
    with ExitStack() as stack:
        engine = train_engine(config.actor, model, optim=settings.SFT_OPTIM, seed=config.seed)
        stack.callback(engine.close)
        rollout = rollout_engine(config, engine)
        stack.callback(rollout.close)
        scorer = Scorer(reward_of(config.reward), tokenizer)
        stack.callback(scorer.close)
        rollouts = executor.workers(RolloutEngine, rollout)  # type: ignore[type-abstract]
        workers = RolloutWorkers(executor, rollouts, executor.workers(Scorer, scorer), None, Timings(), False)
        for number in range(1, settings.SFT_MOST_STEPS + 1):
            metrics = sft.learn(engine, next(batches), SFTObjectiveSettings())
            if number % settings.SFT_CHECK_EVERY:
                continue
            sync_weights(engine, rollout, version=number)
            answers = roll_out_together(workers, replace(plan, purpose=f"sft {number}"), problems)
            right = float(answers.scores.result()["score"].mean())
            report(number, metrics["train/loss"], right)
            if right >= settings.MEDIOCRE:
                engine.save_pretrained(out)
                tokenizer.save_pretrained(out)
                return number
    raise RlcoreError(
        f"after {settings.SFT_MOST_STEPS} steps of SFT fewer than {settings.MEDIOCRE:.0%} of the answers are right; "
        "try another --seed"
    )
