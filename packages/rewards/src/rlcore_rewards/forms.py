"""How a user's reward function is called: with a sample of ours, as verl calls it, or as TRL does.

All forms but ours take keyword arguments, by which a function's form is recognised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from rlcore.engines.reward import RewardResult, RewardSample
from rlcore_kit.worker.process import WorkerFailure

Form = Literal["auto", "sample", "verl", "verl_batch", "trl"]

VERL: dict[str, Callable[[RewardSample], Any]] = {
    "data_source": lambda sample: sample.data_source,
    "solution_str": lambda sample: sample.completion,
    "ground_truth": lambda sample: sample.ground_truth,
    "extra_info": lambda sample: _extra_info(sample.extra),
    "transcript": lambda sample: _messages(sample.transcript),
}
"""The keyword arguments of verl's ``compute_score`` as functions of a sample; functions may name ``transcript`` too."""

VERL_BATCH = {
    "data_sources": "data_source",
    "solution_strs": "solution_str",
    "ground_truths": "ground_truth",
    "extra_infos": "extra_info",
    "transcripts": "transcript",
}
"""The arguments of verl's batch functions, which are lists of those in `VERL`."""

NOT_OF_VERL = ("transcript", "transcripts")

MARKS: dict[str, Form] = {"solution_str": "verl", "solution_strs": "verl_batch", "completions": "trl"}
"""Parameters that only functions of one form have."""

OPENRLHF = {"queries", "prompts", "labels"}

Finish = Callable[[Any], Any]
"""Turns what a function returned for lists of one sample into the result of that sample."""


def prepare(
    function: Callable[..., Any], form: Form, kwargs: Mapping[str, Any]
) -> Callable[[RewardSample], tuple[dict[str, Any] | None, Finish]]:
    """Return what makes the keyword arguments of a sample (None: the sample itself), and the end of its call.

    Args:
        kwargs: further arguments of every call, which are not among those returned.

    Raises:
        WorkerFailure: the function cannot be called in its form.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        signature = None
    if form == "auto":
        form = "sample" if signature is None else _recognised(function, signature)
    bound = {*kwargs, *(function.keywords if isinstance(function, partial) else {})}  # set by the user
    wanted = _wanted(signature, bound)
    if form == "trl":
        if signature is not None:
            _check(function, signature.bind_partial, form, [], kwargs)
        needed = [] if signature is None else [name for name in _required(signature) if name not in bound]
        return lambda sample: _trl(sample, wanted, needed)
    names = {"verl": list(VERL), "verl_batch": list(VERL_BATCH)}.get(form, [])
    named = () if signature is None else signature.parameters
    chosen = [name for name in names if wanted(name) and (name in named or name not in NOT_OF_VERL)]
    if signature is not None:
        _check(function, signature.bind, form, chosen, kwargs)
    if form == "verl":
        return lambda sample: ({name: VERL[name](sample) for name in chosen}, _unchanged)
    if form == "verl_batch":
        return lambda sample: ({name: [VERL[VERL_BATCH[name]](sample)] for name in chosen}, only)
    return lambda sample: (None, _unchanged)


def _recognised(function: Callable[..., Any], signature: inspect.Signature) -> Form:
    for mark, form in MARKS.items():
        if mark in signature.parameters:
            return form
    if signature.parameters.keys() >= OPENRLHF:
        raise WorkerFailure(
            "startup",
            f"{name_of(function)}{signature} is called as OpenRLHF does; name its arguments as TRL does: completions "
            "for the answers (queries are prompts with answers), prompts, and ground_truth for labels",
        )
    return "sample"


def _wanted(signature: inspect.Signature | None, bound: set[str]) -> Callable[[str], bool]:
    """Return what says whether a function takes an argument of this name, which the user has not set."""
    parameters = {} if signature is None else dict(signature.parameters)
    takes_any = signature is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return lambda name: name not in bound and (takes_any or name in parameters)


def _required(signature: inspect.Signature) -> list[str]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in several
    ]


ARGUMENTS: dict[Form, str] = {
    "sample": f"keyword arguments among {', '.join(VERL)} (at least solution_str) or one RewardSample",
    "verl": f"keyword arguments among {', '.join(VERL)}",
    "verl_batch": f"keyword arguments among {', '.join(VERL_BATCH)}",
    "trl": "keyword arguments: prompts, completions, completion_ids and columns of the data",
}


def _check(
    function: Callable[..., Any], bind: Callable[..., Any], form: Form, names: list[str], kwargs: Mapping[str, Any]
) -> None:
    """Make sure that the function can be called with arguments of these ``names``, or with a sample."""
    try:
        bind(*([None] if form == "sample" else []), **dict.fromkeys(names), **kwargs)
    except TypeError as error:
        raise WorkerFailure(
            "startup",
            f"it must take {ARGUMENTS[form]}, but {name_of(function)}{inspect.signature(function)} cannot be called in "
            f"this way{f' with kwargs {sorted(kwargs)}' if kwargs else ''}: {error}",
        ) from None


def _trl(sample: RewardSample, wanted: Callable[[str], bool], needed: list[str]) -> tuple[dict[str, Any], Finish]:
    """Return the arguments of a TRL function: lists of one sample, one for every column of the data.

    Raises:
        WorkerFailure: the data lacks a column that the function needs.
    """
    text, chat = sample.prompt_text, [{"role": "assistant", "content": sample.completion}]
    if sample.transcript:  # as TRL gives the messages of policy and tools after the prompt
        begins = _messages(sample.transcript[: len(sample.prompt)]) == sample.prompt
        chat = _messages(sample.transcript[len(sample.prompt) if begins else 0 :])
    ids = list(sample.completion_tokens)
    columns = {
        "data_source": sample.data_source,
        "ground_truth": sample.ground_truth,
        "extra_info": _extra_info(sample.extra),
        **sample.extra,
        "prompts": sample.prompt if text is None else text,
        "completions": chat if text is None else sample.completion,
        "completion_ids": ids,
        "completions_ids": ids,  # its name in older versions
    }
    metrics: dict[str, float] = {}
    single = {
        "trainer_state": None,  # the steps of a run are not known in the reward's processes
        "log_metric": metrics.__setitem__,
        "log_extra": lambda column, values: None,  # the text of rollouts is traced elsewhere
    }
    arguments = {name: [value] for name, value in columns.items()} | single
    if missing := [name for name in needed if name not in arguments]:
        raise WorkerFailure(
            "exception",
            f"the function needs {', '.join(map(repr, missing))}, and the data has no such column, only "
            f"{', '.join(sample.extra) or 'ground_truth and data_source'}",
        )
    return {name: value for name, value in arguments.items() if wanted(name)}, partial(_with_metrics, metrics)


def _with_metrics(metrics: dict[str, float], values: Any) -> Any:
    value = only(values)
    if value is None:
        return RewardResult(0.0, metrics, applicable=False)
    return RewardResult(value, metrics) if metrics else value


def only(values: Any) -> Any:
    """Return the result of the only sample.

    Raises:
        WorkerFailure: there is not one result.
    """
    try:
        [value] = values
    except (TypeError, ValueError):
        raise WorkerFailure(
            "result",
            f"the function was called with lists of one sample and returned {values!r:.100}, not a list of one",
        ) from None
    return value


def _unchanged(value: Any) -> Any:
    return value


def name_of(function: Callable[..., Any]) -> str:
    """Return a name for messages: of the function in a partial object, of the class of a callable object."""
    if isinstance(function, partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _messages(transcript: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(message) for message in transcript]


def _extra_info(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the remaining fields of the data file; merge those of its column ``extra_info``, if it has one."""
    nested = extra.get("extra_info")
    if not isinstance(nested, Mapping):
        return dict(extra)
    return {**{key: value for key, value in extra.items() if key != "extra_info"}, **nested}
