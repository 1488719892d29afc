"""Settings of `nemo_gym`, and of its data set."""

from __future__ import annotations

from pydantic import Field

from rlcore.config import Config, FileName
from rlcore_agents.environment.settings import EnvironmentSettings


class NeMoGymSettings(EnvironmentSettings):
    """Settings of `nemo_gym`: a resources server of NeMo Gym."""

    url: str = Field(
        pattern=r"^https?://", description="Address of the resources server, such as http://127.0.0.1:8000."
    )
    headers: dict[str, str] = Field({}, description="HTTP headers of every request.")
    done_flag: bool = Field(
        False, description='End an episode when a tool\'s result is a JSON object with "done": true.'
    )


class NeMoGymData(Config):
    """Options of ``rlcore data nemo-gym``."""

    source: FileName = Field(description="JSON Lines of NeMo Gym: an object with responses_create_params per line.")
    test_source: FileName | None = Field(None, description="Such a file to test on.")
