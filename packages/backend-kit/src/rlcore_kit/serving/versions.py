"""The label that a server's weights carry: which run gave them, and as which version.

vLLM and SGLang attest the label with every token. It names the run, so that a server that another run has used, or
that was started anew, is not taken for one with current weights.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

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

    def adopt(
        self,
        url: str,
        label: str,
        *,
        read_again: Callable[[], None],
        name: Callable[[str], None],
        go_on: Callable[[], None],
    ) -> int:
        """The version of the weights of the server at ``url``, which carry ``label``.

        Those of another run give way to its model's, which are version 0.

        Args:
            read_again: pauses the server and has it read its model's files.
            name: gives its weights a label.
            go_on: ends a pause.
        """
        version = self.number(label)
        if url not in self.greeted and version == UNKNOWN:
            logger.warning("%s holds weights of an earlier run (%s) and reads its model's files again", url, label)
            read_again()
            version = 0
        if label == FRESH or version == 0:
            name(self.label(0))
        if version != UNKNOWN:  # a client that died may have left it paused; a mixture of weights must stay so
            go_on()
        self.greeted.add(url)
        return version
