"""Labels of a server's weights: the run that sent them, and their version.

vLLM and SGLang return the label with every token. It names the run, so that weights of another run, or of a server that
was restarted, are never mistaken for current ones.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field

from rlcore_kit.serving.server_api import ServerAPI

logger = logging.getLogger(__name__)

FRESH = "default"
"""The servers' label of the weights that they started with (vLLM 0.32, SGLang 0.5)."""
UNKNOWN = -1
"""The version of weights that no update of this run completed."""
_UPDATING = "updating"


@dataclass
class WeightLabels:
    """The labels of one run, shared by the clients of all its servers.

    Attributes:
        run: random id of the run.
        known_servers: URLs of servers that this run has connected to before. If such a server holds weights of no
            version of this run, they are not those of an earlier run, and are not replaced by version 0.
    """

    run: str = field(default_factory=lambda: secrets.token_hex(4))
    known_servers: set[str] = field(default_factory=set)

    def label(self, version: int) -> str:
        """Return the label of ``version``."""
        return f"{self.run}:{version}"

    @property
    def updating(self) -> str:
        """The label during an update: if the update breaks off, the mixture of weights is no version."""
        return f"{self.run}:{_UPDATING}"

    def version_of(self, label: str) -> int:
        """Return the version that ``label`` denotes in this run, or `UNKNOWN`."""
        run, _, version = label.rpartition(":")
        if run != self.run:
            return 0 if label == FRESH else UNKNOWN
        return UNKNOWN if version == _UPDATING else int(version)

    def take_over(self, server: ServerAPI, reload_timeout_s: float) -> int:
        """Return the version of the server's weights, and resume the server if it is a version of this run.

        A server that this run sees for the first time with weights of an earlier run loads its model's files again,
        which are version 0. A server with a mixture of weights stays paused until an update succeeds.
        """
        url, label = server.connection.url, server.weight_label()
        version = self.version_of(label)
        if url not in self.known_servers and version == UNKNOWN:
            logger.warning("%s holds weights of an earlier run (%s); it loads its model's files again", url, label)
            server.reload_model(reload_timeout_s)
            version = 0
        if label == FRESH or version == 0:
            server.set_weight_label(self.label(0))
        if version != UNKNOWN:  # a client that died may have left the server paused
            server.connection.wait_for(server.resume(), "resume")
        self.known_servers.add(url)
        return version
