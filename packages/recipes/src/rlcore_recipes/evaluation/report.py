"""The report of an evaluation: estimates by model, data source and metric, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from rich.table import Table

from rlcore.boundary import boundary
from rlcore_recipes.evaluation.results import Record
from rlcore_recipes.evaluation.statistics import Estimate, difference, estimate, prompt_values
from rlcore_recipes.settings.evaluation import EvalConfig

ALL = "all"
"""Name of all data sources together."""

Values = dict[str, dict[str, dict[str, float]]]
"""By data source, metric and prompt's key."""


@dataclass(frozen=True)
class ModelReport:
    """What was found of one model.

    Attributes:
        estimates: by data source and metric.
        differences: from the first model on the prompts of both, likewise; empty for the first one.
        truncated: share of completions that reached their maximum length; ``reward_errors``: of failed rewards.
    """

    name: str
    source: str
    estimates: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    mean_tokens: float
    truncated: float
    reward_errors: float


def reports(config: EvalConfig, found: Sequence[tuple[str, str, Sequence[Record]]]) -> list[ModelReport]:
    """Return the report of each model: its name, how it was named, its records."""
    votes = any(answer.answer is not None for *_, records in found for one in records for answer in one.answers)
    values = [_values(config, records, votes) for *_, records in found]
    return [
        ModelReport(
            name=name,
            source=source,
            estimates=_estimates(values[number], config.report.confidence),
            differences=_differences(values[0], values[number], config.report.confidence) if number else {},
            mean_tokens=fmean(answer.tokens for record in records for answer in record.answers),
            truncated=fmean(answer.finish_reason == "length" for record in records for answer in record.answers),
            reward_errors=fmean(answer.error is not None for record in records for answer in record.answers),
        )
        for number, (name, source, records) in enumerate(found)
    ]


def _values(config: EvalConfig, records: Sequence[Record], votes: bool) -> Values:
    found: Values = {}
    several = len({record.data_source for record in records}) > 1
    for record in records:
        results = [answer.result for answer in record.answers]
        values = prompt_values(results, config.ks, config.report.pass_score, votes)
        for source in (record.data_source, ALL) if several else (record.data_source,):
            for metric, value in values.items():
                found.setdefault(source, {}).setdefault(metric, {})[record.key] = value
    return dict(sorted(found.items(), key=lambda item: (item[0] == ALL, item[0])))


def _estimates(values: Values, confidence: float) -> dict[str, dict[str, Estimate]]:
    return {
        source: {
            metric: estimate(list(by_key.values()), confidence, bounded=metric.startswith("pass@"))
            for metric, by_key in metrics.items()
        }
        for source, metrics in values.items()
    }


def _differences(before: Values, after: Values, confidence: float) -> dict[str, dict[str, Estimate]]:
    found: dict[str, dict[str, Estimate]] = {}
    for source, metrics in after.items():
        for metric, by_key in metrics.items():
            one = difference(before.get(source, {}).get(metric, {}), by_key, confidence)
            if one is not None:
                found.setdefault(source, {})[metric] = one
    return found


def write_json(path: Path, config: EvalConfig, found: Sequence[ModelReport]) -> None:
    """Write the reports with what was computed how.

    Raises:
        DataError: the file cannot be written.
    """
    content = {
        "config": config.model_dump(mode="json"),
        "interval": "normal over per-prompt values, Wilson where all are 0 or 1; differences are paired by prompt",
        "confidence": config.report.confidence,
        "models": [asdict(one) for one in found],
    }
    with boundary(f"{path} cannot be written"):
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def table(found: Sequence[ModelReport], confidence: float) -> Table:
    """Return a row per data source and metric, a column per model, and one per difference from the first model."""
    result = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    first, *others = found
    letters = [ascii_uppercase[number] if number < 26 else f"M{number + 1}" for number in range(len(found))]
    names = [*letters, *(f"{letter} − A" for letter in letters[1:])] if others else [first.name]
    for title in ("data source", "metric", *names):
        result.add_column(title, overflow="fold")
    for source in dict.fromkeys(source for one in found for source in one.estimates):
        for metric in dict.fromkeys(metric for one in found for metric in one.estimates.get(source, {})):
            cells = [_shown(one.estimates, source, metric) for one in found]
            cells += [_shown(one.differences, source, metric, signed=True) for one in others]
            result.add_row(source, metric, *cells)
    result.add_row("", "mean tokens", *(f"{one.mean_tokens:.0f}" for one in found))
    result.add_row("", "truncated", *(f"{one.truncated:.1%}" for one in found))
    result.add_row("", "failed rewards", *(f"{one.reward_errors:.1%}" for one in found))
    prompts = max(one.prompts for metrics in first.estimates.values() for one in metrics.values())
    lines = [f"{prompts:,} prompts; {confidence:.0%} confidence intervals"]
    if others:
        lines[0] += "; * an interval of a difference without 0"
        lines += [f"{letter}: {one.name}" for letter, one in zip(letters, found)]
    result.caption, result.caption_justify = "\n".join(lines), "left"
    return result


def _shown(estimates: Mapping[str, Mapping[str, Estimate]], source: str, metric: str, signed: bool = False) -> str:
    one: Any = estimates.get(source, {}).get(metric)
    if one is None:
        return "–"
    form = "+.3f" if signed else ".3f"
    if one.low is None:
        return f"{one.value:{form}}"
    mark = "*" if signed and (one.low > 0 or one.high < 0) else ""
    return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]{mark}"
