"""Run recipes from Python: `train` and `open_run`. The package of the recipes does the work."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, overload

from rlcore import plugins
from rlcore.config.base import Config
from rlcore.training_run import TrainingRun


class ArrowTable(Protocol):
    """A table that offers its data as an Arrow stream: of pyarrow, pandas, polars, duckdb and others."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


class RowDataset(Protocol):
    """A data set of rows, such as ``datasets.Dataset``."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


PathName: TypeAlias = "str | os.PathLike[str]"
Data: TypeAlias = "PathName | Sequence[PathName] | Sequence[Mapping[str, Any]] | ArrowTable | RowDataset"
RewardFunction: TypeAlias = "Callable[..., Any] | Callable[..., Awaitable[Any]]"
OneReward: TypeAlias = "str | RewardFunction"
Reward: TypeAlias = "OneReward | Sequence[OneReward | tuple[OneReward, float]]"
Configuration: TypeAlias = "PathName | Mapping[str, Any] | Config"


@overload
def train(
    recipe: Literal["grpo", "dapo", "ppo"],
    *,
    model: PathName | None = None,
    data: Data | None = None,
    val_data: Data | None = None,
    reward: Reward | None = None,
    config: Configuration | None = None,
    overrides: Mapping[str, Any] | None = None,
    out_dir: PathName | None = None,
) -> TrainingRun: ...


@overload
def train(
    recipe: Literal["sft", "rm"],
    *,
    model: PathName | None = None,
    data: Data | None = None,
    val_data: Data | None = None,
    config: Configuration | None = None,
    overrides: Mapping[str, Any] | None = None,
    out_dir: PathName | None = None,
) -> TrainingRun: ...


@overload
def train(
    recipe: str,
    *,
    model: PathName | None = None,
    data: Data | None = None,
    val_data: Data | None = None,
    reward: Reward | None = None,
    config: Configuration | None = None,
    overrides: Mapping[str, Any] | None = None,
    out_dir: PathName | None = None,
) -> TrainingRun: ...


def train(
    recipe: str,
    *,
    model: PathName | None = None,
    data: Data | None = None,
    val_data: Data | None = None,
    reward: Reward | None = None,
    config: Configuration | None = None,
    overrides: Mapping[str, Any] | None = None,
    out_dir: PathName | None = None,
) -> TrainingRun:
    """Run a recipe, as ``rlcore run`` does, with objects in the place of files.

    Arguments take precedence over ``config``, and ``overrides`` over both. With the ``out_dir`` of an earlier run the
    run continues from its newest checkpoint. Some defaults differ from those of the command line: the model is written
    at the end (``trainer.save_hf``), a checkpoint every 50 steps, at the end and at an interrupt
    (``trainer.save_freq``), and eight completions of each step are logged (``trainer.log_rollouts``).

    Args:
        recipe: name of an installed recipe (``rlcore run`` lists them).
        model: folder or Hub name of the model to train.
        data: what to train on: a ``datasets.Dataset``, a list of dicts, a table (pyarrow, pandas, polars …), a file or
            Hub name as in ``data.train_files``, or a list of these names. Objects are written below ``out_dir``.
        val_data: what to validate on, as ``data``; ``trainer.test_freq`` is then 10 unless the configuration sets it.
        reward: a function or coroutine function in one of the forms that ``reward.path`` takes; the name of a reward,
            such as "gsm8k"; ``file.py:function``; or a list of these, or of pairs ``(reward, weight)``, whose scores
            are added. Functions run in the reward's worker processes, to which they are copied by cloudpickle.
        config: a YAML file, the name of a ready-made configuration, nested mappings, or a configuration object of the
            recipe, such as ``GRPOConfig``.
        overrides: values by dotted key.
        out_dir: folder of the run; by default a new one, ``runs/<recipe>-<time>``.

    Returns:
        what the run left, which `open_run` reads from its folder at any time.

    Raises:
        RlcoreError: something in the arguments or the configuration is wrong; the message names all problems.
        TrainingInterrupted: after an interrupt (SIGINT, the stop button of a notebook), when the step under way is made
            and a checkpoint written. A second interrupt ends the run immediately, by KeyboardInterrupt.
    """
    run: TrainingRun = plugins.load(plugins.FUNCTIONS, "train", "function")(
        recipe,
        model=model,
        data=data,
        val_data=val_data,
        reward=reward,
        config=config,
        overrides=overrides,
        out_dir=out_dir,
    )
    return run


def open_run(out_dir: PathName) -> TrainingRun:
    """Read the results of a run from its folder; it may have been started on the command line, and may still go on.

    Raises:
        DataError: there is no run in the folder, or a file of it is damaged.
    """
    run: TrainingRun = plugins.load(plugins.FUNCTIONS, "open_run", "function")(out_dir)
    return run
