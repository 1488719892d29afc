"""The slowest test files of a run, for every session of nox."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SHOWN = 10


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the seconds that the tests of each file took, with their fixtures; add them to the file $FILE_SECONDS."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # the process that started it reports for all
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"slowest {SHOWN} files")
    for file, spent in seconds.most_common(SHOWN):
        terminalreporter.line(f"{spent:7.1f} s  {file}")
    if path := os.environ.get("FILE_SECONDS"):
        with Path(path).open("a") as log:
            log.write(json.dumps(seconds) + "\n")
