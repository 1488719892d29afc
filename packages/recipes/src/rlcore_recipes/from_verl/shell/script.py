"""The command of verl in a shell script. The script is read as bash would read it; nothing in it is run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.shell.file import script_source
from rlcore_recipes.from_verl.shell.reader import Reader
from rlcore_recipes.from_verl.shell.state import Script, initial_state


def read_script(path: Path, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> Script:
    """Find the command of verl that the script ``path`` runs.

    Args:
        environment: variables that are set when the script starts.
        arguments: ``$1``, ``$2`` … and ``"$@"``.

    Raises:
        ConfigError: the file cannot be read, is no shell script, runs no or several commands of verl, or an argument of
            the command is only known when the script runs.
    """
    source = script_source(path)
    reader = Reader(initial_state(environment, arguments, str(path), os.getcwd()))
    end = reader.read(source)
    if len(reader.found) == 1:
        return reader.found[0]
    if reader.found:
        places = ", ".join(script.launch.entry.place for script in reader.found)
        raise ConfigError(f"{path}: runs verl {len(reader.found)} times ({places}); give one of the commands after --")
    hint = f"; it ends at {end}" if end else ""
    others = "".join(f"; {other}" for other in reader.others)
    raise ConfigError(f"{path}: no command of verl is run, such as python3 -m verl.trainer.main_ppo{hint}{others}")
