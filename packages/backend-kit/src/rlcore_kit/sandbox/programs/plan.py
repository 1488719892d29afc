"""What the host tells the programs of a sandbox."""

from __future__ import annotations

import json
from typing import TypedDict, cast


class Plan(TypedDict):
    """Description of one sandbox.

    Attributes:
        binds: files and folders of the host to show, read-only, outer ones first.
        links: symbolic links, as link and target.
        packages: folders in which Python code finds packages.
        uid: user and group id to become; None: stay.
        report: descriptor of the pipe for reports.
    """

    binds: list[str]
    links: list[tuple[str, str]]
    packages: list[str]
    uid: int | None
    report: int
    memory_mb: int
    cpu_s: int
    processes: int
    disk_mb: int


def read_plan(text: str) -> Plan:
    """Return the plan that the host wrote as JSON."""
    return cast(Plan, json.loads(text))
