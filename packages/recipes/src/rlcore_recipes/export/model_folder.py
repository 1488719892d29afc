"""Write a checkpoint of a run as a model folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlcore import plugins
from rlcore.boundary import boundary
from rlcore.engines import ExportSpec, ModelSettings, TrainEngineSpec
from rlcore.engines.settings import Head
from rlcore.errors import ConfigError, EngineError, RlcoreError
from rlcore_recipes.checkpoint.engine_side import local_part
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.end_tokens import missing_ends, save_tokenizer, written_ends
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.export.source import ADAPTER_CONFIG, MODEL_CONFIG, TrainedModel
from rlcore_recipes.run.preflight import check_sources
from rlcore_recipes.run.roles import engine_of

ExportDType = Literal["float32", "bfloat16", "float16"]
EXPORTED = ("actor", "critic", "prm")
"""Roles whose weights are in checkpoints."""


@dataclass(frozen=True)
class ExportOptions:
    """How a model folder is written.

    Attributes:
        role: whose weights.
        dtype: precision; None is that of the original model's files, or ``model.export_dtype`` of the run.
        adapter: the adapters alone, as PEFT loads them.
        file_mb: maximum size of a weight file in MiB; None is the run's.
        model: the original model's folder, if it is elsewhere now.
    """

    role: str = "actor"
    dtype: ExportDType | None = None
    adapter: bool = False
    file_mb: int | None = None
    model: str | None = None


def export_checkpoint(trained: TrainedModel, folder: Path, options: ExportOptions, overwrite: bool = False) -> None:
    """Write the weights of one role with configuration and tokenizer to ``folder``, which appears when it is complete.

    Raises:
        ConfigError: the folder is taken, or the checkpoint does not hold the role.
        RlcoreError: the original model or the checkpoint is missing or damaged, or the folder cannot be written.
    """
    check_free(folder, overwrite)
    files = trained.files_of(options.role)
    name, spec = role_spec(trained, options)
    check_sources(spec.model, [])
    tokenizer = load_tokenizer(spec.model)
    ends = written_ends(Renderer(trained.config.data, tokenizer), bool(tokenizer.chat_template))
    stop_tokens = missing_ends(spec.model, tokenizer, ends)
    with _appearing(folder) as temporary, local_part(trained.location, options.role, files) as checkpoint:
        write_weights(name, ExportSpec(spec, checkpoint, temporary, options.adapter))
        with boundary(f"{folder}: the tokenizer cannot be written", EngineError):
            save_tokenizer(tokenizer, stop_tokens, temporary)


def write_weights(engine: str, spec: ExportSpec) -> None:
    """Export by the plugin's own function; otherwise build the engine, load the checkpoint and save the model."""
    plugin = plugins.get("rlcore.train_engines", engine)
    export = plugin.import_export()
    if export is not None:
        export(spec)
        return
    if spec.adapter:
        raise EngineError(f"the engine {engine} cannot export adapters alone; export the complete weights")
    built = plugin.build(spec.engine)
    try:
        built.load(spec.checkpoint)
        built.save_pretrained(spec.folder)
    finally:
        built.close()


def role_spec(trained: TrainedModel, options: ExportOptions) -> tuple[str, TrainEngineSpec]:
    """Return the engine of a role, and what it is built from, without an optimizer.

    Raises:
        ConfigError: the recipe trains no such role.
    """
    config, role = trained.config, options.role
    section = getattr(config, role, None)
    if section is None or role not in EXPORTED:
        raise ConfigError(f"the recipe {trained.state.recipe} has no role {role!r} that can be exported")
    model: ModelSettings = getattr(section, "model", None) or config.model
    changes = {"export_dtype": options.dtype, "export_file_mb": options.file_mb, "path": options.model}
    model = model.model_copy(update={key: value for key, value in changes.items() if value is not None})
    engine, engine_options = engine_of(section, config.actor)
    head: Head = "value" if role == "critic" else getattr(config, "head", "policy")
    # the checkpoint has the head, which the model that the run started from may lack
    outputs = getattr(config, "head_outputs", 1)
    return engine, TrainEngineSpec(
        model, engine_options, head=head, seed=config.seed, new_head=True, head_outputs=outputs
    )


def check_free(folder: Path, overwrite: bool) -> None:
    """Make sure that ``folder`` can be written: it is new or empty, or a model folder that may be replaced.

    Raises:
        ConfigError: it is not.
    """
    if folder.is_dir() and not os.listdir(folder):
        return
    if os.path.lexists(folder):
        if not overwrite:
            raise ConfigError(f"--out {folder} exists already: name another folder, or give --overwrite")
        if not any((folder / name).is_file() for name in (MODEL_CONFIG, ADAPTER_CONFIG)):
            raise ConfigError(f"--out {folder} is no model folder, and --overwrite replaces nothing else")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Have a folder to write that takes the place of ``folder`` in the end, and is deleted if there is an error."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.export")
    with boundary(f"{folder} cannot be written", EngineError):
        shutil.rmtree(temporary, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            yield temporary
        except RlcoreError as error:  # the user knows the folder by its final name
            raise type(error)(str(error).replace(str(temporary), str(folder))) from error
        with boundary(f"{folder} cannot be written", EngineError):
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
