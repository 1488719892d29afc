"""Storage of checkpoints: one interface for folders and URLs.

Everything here is called on the main process only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rlcore.engines.train import FileRecord
from rlcore_recipes.checkpoint.manifest import Manifest
from rlcore_recipes.checkpoint.naming import is_url, normal


class Storage(Protocol):
    """Checkpoints by name below one root. Errors are `CheckpointError`."""

    def names(self) -> list[str]:
        """Return what is named like a checkpoint, complete or not, oldest first."""
        ...

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of checkpoint ``name``."""
        ...

    def read(self, name: str, file: str) -> bytes:
        """Return the bytes of a file of checkpoint ``name``."""
        ...

    def check(self, name: str) -> None:
        """Raise unless the checkpoint is complete, as far as that can be seen without fetching it from elsewhere."""
        ...

    def taken(self) -> list[str]:
        """Return the names of checkpoints at which something is stored already, be it a checkpoint or not."""
        ...

    def check_writable(self) -> None:
        """Raise unless something can be written below the root; nothing of that stays."""
        ...

    def check_replaceable(self, name: str) -> None:
        """Raise if the checkpoint cannot be written because something else than a checkpoint has its name."""
        ...

    def begin(self, name: str) -> None:
        """Make room for a checkpoint that is about to be written."""
        ...

    def publish(
        self, name: str, step: int, metrics: Mapping[str, float], files: Mapping[str, FileRecord], state: bytes
    ) -> None:
        """Complete the checkpoint whose ``files`` are written; until this returns it does not count."""
        ...

    def abandon(self, name: str) -> None:
        """Delete what was written since `begin`, as far as that is possible."""
        ...

    def delete(self, name: str) -> None:
        """Delete a checkpoint such that nothing that looks like one remains if this is interrupted."""
        ...

    def clean_up(self) -> None:
        """Delete what a crash left unfinished."""
        ...


def open_storage(root: str | Path) -> Storage:
    """Return the storage at a folder or URL.

    Raises:
        CheckpointError: there is no implementation for the URL; the message names what to install.
    """
    place = normal(root)
    if is_url(place):
        from rlcore_recipes.checkpoint.remote import RemoteStorage

        return RemoteStorage(place)
    from rlcore_recipes.checkpoint.folder import FolderStorage

    return FolderStorage(Path(place))
