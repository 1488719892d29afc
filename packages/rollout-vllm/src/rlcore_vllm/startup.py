"""The reason why a process of vLLM cannot start.

vLLM (0.32) raises an error without the reason in the process that waits, and logs the reason in the one that failed.
Here processes get a logging configuration with an additional handler, which writes such errors to a file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlcore_vllm import quirks

HANDLER = "rlcore"


class Notes(logging.Handler):
    """Appends the reason of every logged exception as a line to the file ``path``, while it exists."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Write the root cause of the exception in ``record``, if it has one."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            with os.fdopen(descriptor, "a") as file:
                file.write(quirks.root_reason(error) + "\n")


@contextmanager
def noting_reasons(arguments: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[[], str | None]]]:
    """Yield engine arguments whose processes record why they cannot start, and a function for the first reason.

    A logging configuration of the user is kept, and then no reasons are recorded.
    """
    from vllm.config.logging import LoggingConfig
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    settings = LoggingConfig()
    if "logging_config" in arguments or settings.pylogging_config_file or not settings.configure_logging:
        yield arguments, lambda: None
        return
    with TemporaryDirectory(prefix="rlcore-vllm-") as folder:
        notes = Path(folder) / "reasons"
        notes.touch()
        configuration = deepcopy(DEFAULT_LOGGING_CONFIG)
        configuration["handlers"][HANDLER] = {"class": f"{__name__}.{Notes.__name__}", "path": str(notes)}
        configuration["loggers"]["vllm"]["handlers"].append(HANDLER)
        file = Path(folder) / "logging.json"
        file.write_text(json.dumps(configuration))
        try:
            yield (
                {**arguments, "logging_config": LoggingConfig(pylogging_config_file=str(file))},
                lambda: next(iter(notes.read_text().splitlines()), None),
            )
        finally:
            _forget_handler()


def _forget_handler() -> None:
    # vLLM configures the logging of this process too
    logger = logging.getLogger("vllm")
    for handler in logger.handlers:
        if isinstance(handler, Notes):
            logger.removeHandler(handler)
            break
