"""`function`: a Python function of the user, run in the pool. `rlcore_rewards.calling` is the workers' side."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, JsonValue, field_validator

from rlcore.config import Config, FileName
from rlcore.config.values import is_url
from rlcore.engines.settings import RewardSettings
from rlcore.errors import ConfigError
from rlcore.object_path import existing_file
from rlcore_kit.worker.process import WorkerFailure
from rlcore_rewards.calling import PICKLE
from rlcore_rewards.forms import Form
from rlcore_rewards.pool import PooledReward

_PATH = re.compile(r"(.+\.(?:py|pickle)|[A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")


class FunctionOptions(Config):
    """Options of `function`."""

    path: FileName = Field(
        description="'file.py:function' or 'package.module:function'; rlcore.train names the files that it writes."
    )
    kwargs: dict[str, JsonValue] = Field({}, description="Additional keyword arguments of every call.")
    form: Form = Field(
        "auto",
        description="How the function is called: with one RewardSample (sample), as verl's compute_score (verl), as "
        "verl's batch functions (verl_batch), or as TRL's reward functions (trl). auto: by its parameters.",
    )

    @field_validator("path")
    @classmethod
    def _has_two_parts(cls, path: str) -> str:
        if not _PATH.fullmatch(path):
            raise ValueError(f"{path!r} is neither 'file.py:function' nor 'package.module:function'")
        return path


def function_reward(options: FunctionOptions, settings: RewardSettings) -> PooledReward:
    """Make a reward of the user's function; `rlcore_rewards.calling.load` describes its arguments and results.

    Raises:
        ConfigError: the file, module or function does not exist, or cannot be called with a sample.
    """
    home, _, name = options.path.rpartition(":")
    if is_url(home) or home.endswith((".py", PICKLE)):
        try:
            home = str(existing_file(home))
        except ConfigError as error:
            raise ConfigError(f"reward function {options.path!r}: {error}") from None
    spec: dict[str, Any] = {"home": home, "name": name, "kwargs": options.kwargs, "form": options.form}
    try:
        return PooledReward("function", "rlcore_rewards.calling:load", spec, settings)
    except WorkerFailure as failure:
        what = name if home.endswith(PICKLE) else repr(options.path)
        raise ConfigError(f"reward function {what}: {failure}") from None
