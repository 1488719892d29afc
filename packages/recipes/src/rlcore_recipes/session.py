"""What the steps of a reinforcement-learning run work with: models, prompts, tokenizer, and the loop around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rlcore.algorithms.kl import KLController, kl_controller
from rlcore.batch import Batch
from rlcore_recipes.data.loader import PromptLoader
from rlcore_recipes.data.prompts import PromptDataset, PromptSample, load_prompts
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.roles import Roles, build_roles
from rlcore_recipes.rollouts import generate, validation_sampling
from rlcore_recipes.run_folder import check_free
from rlcore_recipes.scoring import score
from rlcore_recipes.settings import CriticSettings, RLConfig
from rlcore_recipes.timing import Timings
from rlcore_recipes.train_loop import Run, Stateful, train
from rlcore_recipes.updates import sync_policy
from rlcore_recipes.validation import Validation, validate

C = TypeVar("C", bound=RLConfig)


@dataclass
class Session(Generic[C]):
    """The parts of one run.

    Attributes:
        prompts: endless batches of training prompts.
        val_prompts: None where nothing is validated.
        kl: holds the coefficient of the KL penalty in the reward; None without one.
    """

    config: C
    roles: Roles
    tokenizer: Any
    prompts: PromptLoader
    val_prompts: PromptDataset | None
    kl: KLController | None
    total_steps: int
    timed: Timings = field(default_factory=Timings)


@contextmanager
def open_session(config: C, *, critic: CriticSettings | None = None, draw: int | None = None) -> Iterator[Session[C]]:
    """Read the data, then build the models; closes them at the end.

    Args:
        critic: its settings; None where the run has none.
        draw: prompts in one batch of the loader; None: ``data.train_batch_size``.

    Raises:
        RlcoreError: something in the input is missing, broken or in the way. Nothing has been written then.
    """
    data, trainer = config.data, config.trainer
    check_free(trainer, config)
    tokenizer = load_tokenizer(config.model)
    dataset = load_prompts(data, data.train_files, tokenizer)
    # made for its check of sizes and its count of steps even where the loader draws other batches
    batches = PromptLoader(dataset, data.train_batch_size, seed=config.seed, shuffle=data.shuffle, weights=data.weights)
    total_steps = trainer.total_steps or trainer.total_epochs * batches.steps_per_epoch
    prompts = (
        batches
        if draw is None
        else PromptLoader(dataset, draw, seed=config.seed, shuffle=data.shuffle, weights=data.weights)
    )
    val_prompts = load_prompts(data, data.val_files, tokenizer, data.val_limit) if trainer.test_freq > 0 else None
    penalty = config.algorithm.kl_in_reward
    with ExitStack() as stack:
        yield Session(
            config=config,
            roles=build_roles(config, critic, total_steps, stack),
            tokenizer=tokenizer,
            prompts=prompts,
            val_prompts=val_prompts,
            kl=None if penalty is None else kl_controller(penalty),
            total_steps=total_steps,
        )


def train_rl(session: Session[C], recipe: str, step: Callable[[Session[C], int], dict[str, float]]) -> None:
    """Train with ``step`` until the end (see `train`)."""
    roles = session.roles
    parts: dict[str, Stateful] = {"prompts": session.prompts}
    if session.kl is not None:
        parts["kl"] = _KLState(session.kl)
    train(
        Run(
            recipe=recipe,
            config=session.config,
            trainer=session.config.trainer,
            seed=session.config.seed,
            total_steps=session.total_steps,
            step=lambda number: step(session, number),
            validate=None if session.val_prompts is None else lambda: validate_policy(session),
            engines=roles.trained(),
            parts=parts,
            resumed=lambda done: sync_policy(roles, session.config, version=done),
            save_tokenizer=session.tokenizer.save_pretrained,
            timed=session.timed,
        )
    )


def validate_policy(session: Session[Any]) -> Validation:
    config, roles = session.config, session.roles
    sampling = validation_sampling(config.rollout, config.data.max_response_length)
    n = config.rollout.validation.n

    def answer(prompts: Sequence[PromptSample]) -> Batch:
        completions = generate(roles.rollout, prompts, sampling, n, config.seed, purpose="validation")
        return score(roles.reward, session.tokenizer, completions)

    assert session.val_prompts is not None
    outcome = validate(session.val_prompts, answer, config.data.val_batch_size, config.trainer.log_val_generations)
    if config.rollout.free_memory:
        roles.rollout.sleep()
    return outcome


@dataclass(frozen=True)
class _KLState:
    controller: KLController

    def state(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(dict(state))
