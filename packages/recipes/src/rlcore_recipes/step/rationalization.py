"""Rationalization: second attempts, with the answer in the prompt, where nothing of the first was good enough.

Source: STaR, Zelikman et al. 2022, arXiv:2203.14465 (§3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines.episode import PromptSample
from rlcore.metrics import Metrics
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.prompts import Prompt
from rlcore_recipes.rollouts.plan import training_plan
from rlcore_recipes.rollouts.synchronous import roll_out_together
from rlcore_recipes.run.session import Session
from rlcore_recipes.step.rollout import add_scores
from rlcore_recipes.step.selection import add_sample_weights

FILL = {"loss_mask": 0.0, "token_version": -1}
"""Values of per-token columns on the prompt."""


def add_rationalizations(session: Session[Any], batch: Batch) -> tuple[Batch, Metrics]:
    """Append completions that were made with a hint, as if there had been none, for prompts of which nothing was kept.

    Their rows have the prompt without the hint, and the prompt's group. The rollout engine's log-probs, which are those
    under the hint, are removed from all rows. Metrics are under ``rationalization/``: ``prompts`` counts those that got
    a hint, ``without_answer`` and ``too_long`` those that could not, and the others are as in `add_sample_weights`.
    """
    settings = session.config.algorithm.rationalization
    if settings is None:
        return batch, Metrics()
    batch = batch.drop("rollout_logprobs") if "rollout_logprobs" in batch else batch
    failed = session.executor.compute(prompts_without_weight, batch)
    hinted, metrics = _with_hints(session, failed)
    if not hinted:
        return batch, metrics
    plan = training_plan(session.config, session.stop_tokens)
    plan = replace(plan, purpose="rationalization", n=settings.n or plan.n, baseline=None, keep=None)
    samples = roll_out_together(session.workers, plan, hinted)
    found, counts = add_sample_weights(session, add_scores(session, samples.batch, samples), "rationalization")
    originals = {sample.position: sample for sample in failed}
    found = session.executor.compute(without_hints, found.select(*batch.names), originals)
    return type(batch).concat([batch, found]), Metrics.merge([metrics, counts])


def prompts_without_weight(batch: Batch) -> list[PromptSample]:
    """Return the prompts of which no sample has a ``sample_weight``, each at the position that is its group."""
    kept = set(batch["group"][batch["sample_weight"] > 0].tolist())
    tokens, lengths = batch["tokens"].to_list(), batch["prompt_length"].tolist()
    first: dict[int, int] = {}
    for row, group in enumerate(batch["group"].tolist()):
        first.setdefault(group, row)
    return [
        PromptSample(
            prompt_tokens=tokens[row][: lengths[row]].tolist(),
            messages=batch["messages"][row],
            ground_truth=batch["ground_truth"][row],
            data_source=batch["data_source"][row],
            extra=batch["extra"][row],
            position=group,
            text=batch["prompt_text"][row],
        )
        for group, row in first.items()
        if group not in kept
    ]


def _with_hints(session: Session[Any], failed: Sequence[PromptSample]) -> tuple[list[PromptSample], Metrics]:
    """Return the prompts that can be given a hint, with it, and the metrics that count them."""
    data, hint = session.config.data, session.config.algorithm.rationalization.hint
    known = [sample for sample in failed if sample.ground_truth is not None]
    prompts = [_with_hint(sample, hint.format(ground_truth=sample.ground_truth)) for sample in known]
    places = [f"the prompt of group {sample.position} with its hint" for sample in known]
    tokens = Renderer(data, session.tokenizer).prompt_tokens(prompts, places)
    hinted = [
        replace(sample, prompt_tokens=ids) for sample, ids in zip(known, tokens) if len(ids) <= data.max_prompt_length
    ]
    if too_long := len(known) - len(hinted):
        session.warn_once(
            "rationalization/too_long",
            f"{too_long} of {len(known)} prompts are with their hint longer than "
            f"data.max_prompt_length={data.max_prompt_length} and get none. rationalization/too_long counts them",
        )
    metrics = Metrics()
    metrics.sum("rationalization/prompts", len(hinted))
    metrics.sum("rationalization/without_answer", len(failed) - len(known))
    metrics.sum("rationalization/too_long", too_long)
    return hinted, metrics


def _with_hint(sample: PromptSample, hint: str) -> Prompt:
    """Return the prompt of ``sample`` with ``hint`` at the end of its last message."""
    if sample.text is not None:
        return sample.text + hint
    *before, last = sample.messages
    return [*before, {**last, "content": f"{last['content']}{hint}"}]


def without_hints(batch: Batch, originals: Mapping[int, PromptSample]) -> Batch:
    """Return ``batch`` with the prompt of each row replaced by that of ``originals``, by its group."""
    prompts = [originals[group].prompt_tokens for group in batch["group"].tolist()]
    starts = batch["prompt_length"].tolist()
    columns: dict[str, Jagged] = {}
    for name in batch.jagged_names:
        rows = []
        for row, start, prompt in zip(batch[name].to_list(), starts, prompts):
            head = torch.tensor(prompt) if name == "tokens" else torch.full((len(prompt),), FILL[name])
            rows.append(torch.cat([head.to(row.dtype), row[start:]]))
        columns[name] = Jagged.from_list(rows)
    dense = {name: batch[name] for name in batch.names if name not in columns}
    return Batch({**columns, **dense, "prompt_length": torch.tensor([len(prompt) for prompt in prompts])})
