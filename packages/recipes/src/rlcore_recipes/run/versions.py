"""The code that a run is of: versions of packages, and the commit of the working folder."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("rlcore", "torch", "transformers", "vllm", "sglang", "ray", "megatron-core", "flash-attn")
GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
GIT_S = 10.0


def code_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed ones of `PACKAGES`, and ``commit``, if there is one.

    The commit ends in ``-dirty`` if files that it has were changed.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        result = subprocess.run(GIT, capture_output=True, text=True, timeout=GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git, a repository that is too large
        return found
    return found | ({"commit": result.stdout.strip()} if result.returncode == 0 else {})
