"""Names of checkpoints, and where they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"step-\d{6,}")
_LEFTOVER = re.compile(r"step-\d{6,}\.(tmp|old)")


def name_of(step: int) -> str:
    """Return the name of the checkpoint of ``step``."""
    return f"step-{step:06d}"


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name; -1 if the name is another."""
    return int(name.removeprefix("step-")) if is_name(name) else -1


def is_name(name: str) -> bool:
    """Return whether a checkpoint can have this name."""
    return _NAME.fullmatch(name) is not None


def is_leftover(name: str) -> bool:
    """Return whether a local folder of that name is what a crash left of writing or replacing a checkpoint."""
    return _LEFTOVER.fullmatch(name) is not None


def is_url(root: str) -> bool:
    """Return whether ``root`` is reached through fsspec; ``file://`` is a folder like any other."""
    return "://" in root and not root.startswith("file://")


def normal(root: str | Path) -> str:
    """``root`` without what makes equal places look different: a URL, or an absolute path."""
    text = str(root)
    if is_url(text):
        scheme, _, rest = text.partition("://")
        return f"{scheme}://{rest.rstrip('/')}"
    return str(Path(text.removeprefix("file://")).expanduser().absolute())


@dataclass(frozen=True)
class CheckpointLocation:
    """The checkpoint ``name`` below ``root`` (see `normal`)."""

    root: str
    name: str

    @classmethod
    def of(cls, location: str | Path) -> CheckpointLocation:
        """Return the place of a checkpoint's own folder or URL."""
        parent, _, name = normal(location).rpartition("/")
        return cls(parent, name)

    @property
    def remote(self) -> bool:
        """Whether the checkpoint is at a URL."""
        return is_url(self.root)

    @property
    def path(self) -> str:
        """The folder or URL of the checkpoint, for messages."""
        return f"{self.root}/{self.name}"

    @property
    def unfinished(self) -> Path:
        """The folder in which a local checkpoint is written."""
        return Path(self.root) / f"{self.name}.tmp"
