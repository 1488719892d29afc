"""``rlcore export``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from rlcore.cli.folder import Folder

_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Size(click.ParamType[int]):
    """A number of bytes with a unit, as 5GB; becomes whole MiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", str(value).upper())
        if found is None:
            self.fail(f"{value} is no size: write it as 5GB or 500MiB", param, ctx)
        mebibytes = int(float(found[1]) * _UNITS[found[2]] / 2**20)
        if not 1 <= mebibytes < 2**31:
            self.fail(f"{value} is not between 1MiB and 2PiB", param, ctx)
        return mebibytes


def choice_options(function: Any) -> Any:
    """Add the options by which a command chooses one of a run's checkpoints."""
    for option in (
        click.option(
            "--run-config",
            type=click.Path(path_type=Path),
            help="config.yaml of the run, if SOURCE does not lead to it.",
        ),
        click.option("--best", is_flag=True, help="The run's best checkpoint (trainer.best_metric)."),
        click.option("--step", type=click.IntRange(min=0), help="The run's checkpoint after this step."),
    ):
        function = option(function)
    return function


@click.command()
@click.argument("source")
@click.option("--out", type=Folder(), required=True, help="Folder to write.")
@choice_options
@click.option("--role", default="actor", show_default=True, help="Whose weights: actor, critic, prm.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Precision; default: that of the original's files.")
@click.option("--adapter", is_flag=True, help="Write the LoRA adapter alone instead of merging it.")
@click.option("--max-shard-size", type=_Size(), help="Maximum size of a weight file, such as 5GB; default: 4GiB.")
@click.option("--model", help="Folder of the original model, if it is elsewhere now.")
@click.option("--overwrite", is_flag=True, help="Replace a model folder that is there.")
@click.option("--push-to-hub", metavar="ORG/NAME", help="Upload the folder to the Hugging Face Hub too.")
@click.option("--private", is_flag=True, help="With --push-to-hub: a private repository.")
def export(source: str, out: Path, step: int | None, best: bool, run_config: Path | None, **given: Any) -> None:
    """Write a checkpoint as a Hugging Face model folder, with tokenizer and generation settings.

    SOURCE is the folder of a run (its newest checkpoint), or a checkpoint (a folder or URL). It needs neither a GPU nor
    the number of processes that wrote the checkpoint.
    """
    from rlcore_recipes.export.hub import check_repository, push
    from rlcore_recipes.export.model_folder import ExportOptions, check_free, export_checkpoint
    from rlcore_recipes.export.serving import serving_commands
    from rlcore_recipes.export.source import Choice, find_checkpoint

    repository, overwrite, private = given.pop("push_to_hub"), given.pop("overwrite"), given.pop("private")
    if repository is not None:
        check_repository(repository)
    check_free(out, overwrite)
    dtype, size = _DTYPES.get(given.pop("dtype")), given.pop("max_shard_size")
    trained = find_checkpoint(source, Choice(step, best, run_config))
    options = ExportOptions(dtype=dtype, file_mb=size, **given)  # type: ignore[arg-type]  # of `_DTYPES`
    export_checkpoint(trained, out, options, overwrite)
    click.echo(f"{out}: {options.role} after step {trained.state.step} of {trained.location.path}")
    if options.role == "actor" and getattr(trained.config, "head", "policy") == "score":
        click.echo(f"reinforcement learning takes it as reward_model.model.path={out}")
    elif options.role == "actor":
        click.echo("serve it with one of:")
        for line in serving_commands(out):
            click.echo(f"  {line}")
    if repository is not None:
        click.echo(f"pushed to {push(out, repository, private)}")
