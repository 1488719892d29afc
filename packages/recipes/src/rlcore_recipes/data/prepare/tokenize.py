"""``rlcore data tokenize``: tokenise data for `rlcore run sft` before the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from rlcore.cli.folder import Folder
from rlcore.errors import DataError


@click.command("tokenize", short_help="Samples for `rlcore run sft`, tokenised before the run.")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file with the sections model and data.")
@click.option("--out", type=Folder(), required=True, help="Folder to write a folder for each data file to.")
@click.option("--overwrite", is_flag=True, help="Replace folders that are there.")
@click.argument("values", nargs=-1, metavar="[KEY=VALUE]...")
def tokenize(config: Path | None, out: Path, overwrite: bool, values: tuple[str, ...]) -> None:
    """Tokenise data files as `rlcore run sft` would.

    Keys are those of its sections model and data: model.path=… data.train_files=… data.max_length=…
    """
    from rlcore.config import load_config
    from rlcore_recipes.data.arrow_data import is_tokenized
    from rlcore_recipes.data.end_tokens import model_tokens
    from rlcore_recipes.data.files import HUB
    from rlcore_recipes.data.sft import tokenise
    from rlcore_recipes.data.tokenized import tokenizer_fingerprint, write_tokenized
    from rlcore_recipes.data.tokenizer import load_tokenizer
    from rlcore_recipes.run.preflight import check_sources
    from rlcore_recipes.settings.supervised import TokenizeConfig

    chosen = load_config(TokenizeConfig, config, values)
    files = [*chosen.data.train_files, *chosen.data.val_files]
    check_sources(chosen, files)
    folders = {file: out / (file.replace("/", "_") if HUB.fullmatch(file) else Path(file).stem) for file in files}
    if twice := [folder for folder in folders.values() if list(folders.values()).count(folder) > 1]:
        raise DataError(f"several data files would be written to {twice[0]}; tokenise them one by one")
    existing = [folder for folder in folders.values() if folder.exists()]
    if other := [str(folder) for folder in existing if not is_tokenized(folder)]:
        raise DataError(f"{' and '.join(other)} exist already and hold something else; use another folder")
    if existing and not overwrite:
        raise DataError(f"{' and '.join(map(str, existing))} exist already; use --overwrite, or another folder")
    tokenizer = load_tokenizer(chosen.model)
    size, _ = model_tokens(chosen.model)
    for file, folder in folders.items():
        made = tokenise(chosen.data, file, tokenizer, tokenizer_fingerprint(tokenizer), vocabulary=size)
        if folder.exists():
            shutil.rmtree(folder)
        write_tokenized(folder, made)
        report = made.report
        lost = report.rows - report.samples
        left_out = f", {lost:,} rows left out" if lost else ""
        click.echo(
            f"{folder}: {report.samples:,} samples, {report.tokens:,} tokens, {report.learned:,} learned{left_out}"
        )
