"""The label that a server's weights carry: which run gave them, and as which version.

vLLM and SGLang attest the label with every token. It names the run, so that a server that another run has used, or
that was started anew, is not taken for one with current weights.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

FRESH = "default"
"""The servers' own label of the weights that they started with (vLLM 0.32, SGLang 0.5)."""
UNKNOWN = -1
"""The version of weights that no update of this run completed."""
_UPDATING = "updating"


@dataclass
class Versions:
    """The labels of one run, shared by the clients of all its servers.

    Attributes:
        greeted: servers that this run has met: what they hold now is no other run's, so it is not called version 0.
    """

    run: str = field(default_factory=lambda: secrets.token_hex(4))
    greeted: set[str] = field(default_factory=set)

    def label(self, version: int) -> str:
        return f"{self.run}:{version}"

    @property
    def updating(self) -> str:
        """The label while weights come in: should that break off, nobody takes the mixture for a version."""
        return f"{self.run}:{_UPDATING}"

    def number(self, label: str) -> int:
        """The version that ``label`` means in this run."""
        run, _, version = label.rpartition(":")
        if run != self.run:
            return 0 if label == FRESH else UNKNOWN
        return UNKNOWN if version == _UPDATING else int(version)
