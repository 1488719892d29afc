"""The trackers' own settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from rlcore.config import Config, FileName, FilePath, Package


class ConsoleSettings(Config):
    """Columns of the table that the console shows."""

    columns: dict[str, str] = Field(
        {
            "loss": "train/loss",
            "accuracy": "train/accuracy",
            "score": "critic/score/mean",
            "length": "response_length/mean",
            "turns": "rollout/turns",
            "entropy": "actor/entropy",
            "kl": "actor/ppo_kl",
            "clipped": "actor/pg_clipfrac",
            "grad": "actor/grad_norm",
            "vf loss": "critic/vf_loss",
            "tokens/s": "perf/throughput",
            "s": "timing_s/step",
        },
        description="Headings and the metrics below them; those a run does not have are left out.",
    )
    faults: dict[str, str] = Field(
        {
            "errors": "reward/error_ratio",
            "invalid": "rollout/invalid_ratio",
            "skipped": "actor/skipped_steps",
            "vf skip": "critic/skipped_steps",
            "sft skip": "train/skipped_steps",
        },
        description="Further columns, each shown from the first step on in which its metric is not 0.",
    )


class JsonlSettings(Config):
    """Metrics and tables as lines of JSON in the output folder; nothing to set."""


class WandbSettings(Config):
    """Weights & Biases."""

    project: str | None = Field(None, description="Project; null takes the run's.")
    entity: str | None = Field(None, description="User or team; null takes the account's default.")
    mode: Literal["online", "offline"] | None = Field(
        None, description="offline writes below the output folder only; null goes by WANDB_MODE, online without it."
    )
    group: str | None = Field(None, description="Group of runs.")
    tags: list[str] = Field([], description="Tags of the run.")

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("wandb", "rlcore-recipes[wandb]")


class TensorboardSettings(Config):
    """TensorBoard event files."""

    folder: FileName = Field("tensorboard", description="Folder of the event files, below the output folder.")

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("tensorboard", "rlcore-recipes[tensorboard]")


class SwanlabSettings(Config):
    """SwanLab."""

    project: str | None = Field(None, description="Project; null takes the run's.")
    workspace: str | None = Field(None, description="User or organisation; null takes the account's default.")
    mode: Literal["online", "cloud", "offline", "local", "disabled"] | None = Field(
        None,
        description="local writes for `swanlab watch`, offline for a later `swanlab sync`; cloud is online; null goes "
        "by SWANLAB_MODE, online without it.",
    )
    log_dir: FilePath | None = Field(
        None, description="Folder of its files; null goes by SWANLAB_LOG_DIR, without it out_dir/swanlog."
    )
    group: str | None = Field(None, description="Group of runs.")
    tags: list[str] = Field([], description="Tags of the run.")

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("swanlab", "rlcore-recipes[swanlab]")


class MlflowSettings(Config):
    """MLflow."""

    uri: str | None = Field(
        None,
        description="Tracking server or store; null goes by MLFLOW_TRACKING_URI, without it a data base in out_dir.",
    )
    experiment: str | None = Field(None, description="Experiment; null takes the run's project.")

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("mlflow", "rlcore-recipes[mlflow]")


class TrackioSettings(Config):
    """Trackio: local-first, with a dashboard (`trackio show`)."""

    project: str | None = Field(None, description="Project; null takes the run's.")
    space_id: str | None = Field(
        None, description="Space of the Hugging Face Hub that shows the run; null goes by TRACKIO_SPACE_ID."
    )
    group: str | None = Field(None, description="Group of runs.")

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("trackio", "rlcore-recipes[trackio]")


class ParquetSettings(Config):
    """Tables as Parquet files, one a step."""

    folder: FileName = Field("tables", description="Folder of the files, below the output folder.")
