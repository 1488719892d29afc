"""The Hugging Face Hub, and runs without network."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any
from warnings import warn

from rlcore.errors import RlcoreWarning
from rlcore_recipes.ranks import launched_as_main

CONNECT_S = 5.0
"""Timeout of a connection to the Hub, name resolution included."""


def go_offline_without_network(names: Iterable[str]) -> None:
    """Make libraries read their local cache alone, if the Hub, where ``names`` are, does not answer.

    They would retry for a minute before they say that there is no network; so what is not in the cache fails
    immediately.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    problem = _connection_problem(constants.ENDPOINT)
    if problem is None:
        return
    if launched_as_main():
        warn(
            f"the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached ({problem}); {', '.join(names)} can only "
            "be read from the local cache",
            RlcoreWarning,
            stacklevel=3,
        )
    constants.HF_HUB_OFFLINE = True  # here
    os.environ["HF_HUB_OFFLINE"] = "1"  # and in processes that are started


def _connection_problem(url: str) -> str | None:
    """Return why there is no answer from ``url``; None if there is one."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # public, but not listed

    found: list[Any] = []

    def connect() -> None:
        try:
            get_session().head(url, timeout=CONNECT_S)  # by the proxies and certificates that the downloads use
            found.append(None)
        except Exception as error:
            found.append(str(error).strip().partition("\n")[0] or type(error).__name__)

    # in a thread, because no time limit covers the resolution of the host's name
    attempt = threading.Thread(target=connect, name="hub", daemon=True)
    attempt.start()
    attempt.join(CONNECT_S)
    return found[0] if found else f"no answer within {CONNECT_S:g} s"
