"""Which words of a command line start verl, and with which arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from rlcore_recipes.from_verl.word import Unknown, Word

_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
_OF_VERL = re.compile(r"(?:verl|recipe)\.(?:\w+\.)*\w*(?:main|train)\w*")
_SECTIONS = re.compile(
    r"[+~]{0,2}(?:actor_rollout_ref|data|algorithm|trainer|critic|reward_model|reward|model|optim)\.\w"
)
_RUNS = re.compile(r"python[\d.]*|torchrun|accelerate|deepspeed")


@dataclass(frozen=True)
class Launch:
    """A command that starts verl.

    Attributes:
        entry: the module, such as ``verl.trainer.main_ppo``.
        arguments: what follows it.
    """

    entry: Word
    arguments: tuple[Word, ...]


def find_launch(words: Sequence[Word]) -> Launch | None:
    """Return the start of verl in a command line, behind ray, torchrun, srun, env and the like; None if there is none.

    Raises:
        Unknown: never; words that are not known may be among the arguments.
    """
    texts = ["" if isinstance(word.text, Unknown) else word.text for word in words]
    if texts[:1] in (["echo"], ["printf"]):
        return None
    for index, text in enumerate(texts):
        rest = texts[index + 1 :]
        if text == "-m" and rest and _MODULE.fullmatch(rest[0]) and _is_verl(rest[0], rest[1:]):
            return Launch(words[index + 1], tuple(words[index + 2 :]))
        if text.endswith(".py") and any(_RUNS.fullmatch(PurePosixPath(before).name) for before in texts[:index]):
            module = _module_of(text)
            if _is_verl(module, rest):
                return Launch(replace(words[index], text=module), tuple(words[index + 1 :]))
    return None


def names_verl(text: str) -> bool:
    """Return whether the text of a statement seems to hold a start of verl."""
    return re.search(r"-m\s+[\w.]+|main_\w+\.py|trainer\w*\.py", text) is not None


def _is_verl(module: str, arguments: Sequence[str]) -> bool:
    return _OF_VERL.fullmatch(module) is not None or any(_SECTIONS.match(argument) for argument in arguments)


def _module_of(path: str) -> str:
    """Return the module of a file: verl's from ``verl`` or ``recipe`` on."""
    parts = list(PurePosixPath(path).with_suffix("").parts)
    for package in ("verl", "recipe"):
        if package in parts:
            return ".".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return parts[-1]
