"""Optional packages, and whether they are installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Package:
    """An optional package.

    Attributes:
        module: what is imported.
        install: what ``pip install`` takes.
    """

    module: str
    install: str

    @property
    def installed(self) -> bool:
        """Whether the module can be found; it is not imported.

        A folder without code is no module, although Python would import it: runs leave a folder ``wandb`` in the
        working folder, and a checkout of ``sglang`` is another.
        """
        try:
            spec = find_spec(self.module)
        except (ImportError, ValueError):  # its parent is missing or broken, or it is half imported
            return False
        return spec is not None and spec.origin is not None

    @property
    def advice(self) -> str:
        """What to do about the missing package, as the end of a sentence."""
        return f"needs the package {self.module}, which is not installed; run: pip install '{self.install}'"
