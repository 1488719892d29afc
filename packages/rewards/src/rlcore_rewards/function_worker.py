"""One worker process of the reward pool."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from typing import Any

from rlcore.engines.settings import RewardSettings
from rlcore_kit.worker.process import WorkerLimits, WorkerProcess
from rlcore_rewards.reply import MAX_BYTES, decode
from rlcore_rewards.worker import READY


class FunctionWorker(WorkerProcess):
    """A worker that scores samples; `start` must be called before `ask`.

    Attributes:
        answered: True if the worker has replied to a sample.
    """

    def __init__(self, settings: RewardSettings) -> None:
        limits = WorkerLimits(
            settings.memory_mb, settings.max_processes, settings.max_output_kb, MAX_BYTES, settings.pass_env
        )
        super().__init__("rlcore_rewards.worker", limits)
        self._startup_s = settings.startup_timeout_s
        self.answered = False

    def start(self, loader: str, options: Mapping[str, Any]) -> None:
        """Load the function in the worker: ``loader`` is ``module:attribute`` of a function that takes ``options``.

        Raises:
            WorkerFailure: the function cannot be loaded; the worker must be killed.
        """
        setup = {"sys_path": sys.path, "loader": loader, "options": dict(options)}
        reply = self.exchange(pickle.dumps(setup), self._startup_s, f"startup_timeout_s={self._startup_s:g}")
        if reply != READY:
            decode(reply)

    def ask(self, request: bytes, seconds: float, limit: str) -> bytes:
        """Send a pickled sample and return the reply; arguments and errors as in `exchange`."""
        reply = self.exchange(request, seconds, limit)
        self.answered = True
        return reply
