"""Why a process of vLLM cannot start.

vLLM (0.32) tells whoever waits for its processes only that one did not start, and logs the reason where it was. Here
processes get a logging configuration with one more handler, which notes such errors in a file.
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
    """Appends a line with the reason of every exception that is logged to the file ``path``, as long as it exists."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            with os.fdopen(descriptor, "a") as file:
                file.write(quirks.root_reason(error) + "\n")


@contextmanager
def noting_reasons(arguments: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[[], str | None]]]:
    """Engine arguments whose processes note why they cannot start, and what tells the first such reason, if any.

    A logging configuration of the user's stays, and then there are no notes.
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
    """vLLM configures this process's logging too."""
    logger = logging.getLogger("vllm")
    for handler in logger.handlers:
        if isinstance(handler, Notes):
            logger.removeHandler(handler)
            break
