"""Limits of a sandbox."""

from __future__ import annotations

from pydantic import Field

from rlcore.config import Config


class SandboxLimits(Config):
    """What code in a sandbox may use."""

    timeout_s: float = Field(10.0, gt=0, description="Timeout of one piece of code in seconds.")
    memory_mb: int = Field(
        1024,
        ge=64,
        description="Memory of each process, and of all processes of a sandbox together, in MiB.",
    )
    cpu_s: int = Field(60, ge=1, description="CPU time of a process in seconds.")
    processes: int = Field(32, ge=1, description="Maximum number of processes and threads.")
    disk_mb: int = Field(64, ge=1, description="Size of /tmp, the only folder that can be written, in MiB.")
    output_kb: int = Field(
        64, ge=1, description="Size of the output that is kept, standard output and error each, in KiB."
    )
    site_packages: bool = Field(True, description="Whether the code can import the packages that are installed here.")
