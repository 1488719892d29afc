"""Settings of the run itself: how long, how often, where to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from rlcore.config import FileName, FilePath, Package, PluginSections, Seconds
from rlcore.config.values import is_url
from rlcore_recipes.data.url_packages import package_of


def _no_url(value: Any) -> Any:
    if isinstance(value, (str, Path)) and is_url(value):
        raise PydanticCustomError(
            "path",
            "must be a folder on this machine, not a URL; trainer.checkpoint_dir takes one for the checkpoints",
        )
    return value


class TrainerSettings(PluginSections):
    """Length of the run, validation, checkpoints, tracking. Trackers' own options stand in sections of their names."""

    plugin_group: ClassVar[str] = "rlcore.trackers"
    plugin_field: ClassVar[str] = "trackers"

    total_epochs: int = Field(1, ge=1, description="Passes over the training data; sets the number of steps.")
    total_steps: int | None = Field(None, ge=1, description="Number of steps; overrides total_epochs.")
    out_dir: Annotated[FilePath, BeforeValidator(_no_url)] = Field(
        description="Folder for configuration, metrics and checkpoints."
    )
    project: str = Field("rlcore", description="Project name for trackers.")
    name: str | None = Field(None, description="Run name for trackers; null: the name of out_dir.")
    trackers: list[str] = Field(["console", "jsonl"], description="Where metrics go (`rlcore plugins`).")
    resume_tracking: bool = Field(
        True, description="true: a resumed run continues its runs in the trackers; false: it starts new ones there."
    )
    system_metrics_s: Seconds | None = Field(
        10.0, gt=0, description="Seconds between samples of processor, memory and GPUs; null: no such metrics."
    )
    test_freq: int = Field(
        -1,
        ge=-1,
        description="Validate every so many steps and at the end; -1: never, and the other keys of validation, "
        "log_val_generations and best_metric included, have no effect.",
    )
    val_before_train: bool = Field(True, description="Validate before the first step too, unless test_freq is -1.")
    log_val_generations: int = Field(0, ge=0, description="Validation completions to log as a table.")
    log_rollouts: int = Field(
        0, ge=-1, description="Training completions of each step to log as the table rollouts; -1: all."
    )
    save_freq: int = Field(-1, ge=-1, description="Checkpoint every so many steps and at the end; -1: never.")
    async_save: bool = Field(True, description="Write checkpoints in the background while training continues.")
    checkpoint_dir: FileName | None = Field(
        None,
        description="Folder or URL (s3://, gs://, any of fsspec's) for checkpoints; null: out_dir/checkpoints.",
    )
    grace_s: Seconds = Field(
        120.0, gt=0, description="Graceful shutdown: seconds after SIGTERM or SIGHUP for the step and its checkpoint."
    )
    max_skipped_steps: int | None = Field(
        10,
        ge=1,
        description="End the run after so many steps in a row in which an update was skipped, because its gradient "
        "norm was not finite; null: never.",
    )
    keep_checkpoints: int | None = Field(2, ge=1, description="Newest checkpoints to keep; null: all.")
    best_metric: str | None = Field(None, description="Keep the checkpoint that is best by this metric as well.")
    best_mode: Literal["max", "min"] = Field(
        "max", description="'max': a larger best_metric is better; 'min': a smaller one."
    )
    resume: FileName = Field(
        "auto",
        description="'auto': continue from the run's newest checkpoint, if there is one; 'never': start from the "
        "beginning, in a folder without another run; otherwise the checkpoint's folder or URL.",
    )
    save_hf: bool = Field(False, description="Write the final model in Hugging Face format to out_dir/model.")

    @property
    def checkpoint_root(self) -> str:
        """The folder or URL below which checkpoints are."""
        return self.checkpoint_dir or str(self.out_dir / "checkpoints")

    @property
    def length(self) -> tuple[str, str]:
        """The key that sets the number of steps, and the number."""
        if self.total_steps is not None:
            return "trainer.total_steps", str(self.total_steps)
        return "trainer.total_epochs over the training data", f"{self.total_epochs} epochs"

    def packages(self) -> Iterator[tuple[str, Package]]:
        for key in ("checkpoint_dir", "resume"):
            url = getattr(self, key)
            if url is not None and (package := package_of(url)) is not None:
                yield key, package

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint_dir is not None and "memory://" in self.checkpoint_dir:
            yield "checkpoint_dir", "memory:// ends with the process, and the checkpoints with it; name a folder or URL"
        for name in ("test_freq", "save_freq"):
            if getattr(self, name) == 0:
                yield name, "0 is no interval: use -1 for never, or every so many steps"
        if self.best_metric is not None and self.save_freq < 0 < self.test_freq:
            yield "best_metric", f"{self.best_metric!r} picks among checkpoints, but save_freq is -1: none is written"
