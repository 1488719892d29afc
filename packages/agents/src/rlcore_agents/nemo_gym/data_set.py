"""``rlcore data nemo-gym``: rows of NeMo Gym as they are, with their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.engines.episode import PromptSample
from rlcore.errors import DataError
from rlcore_agents.nemo_gym.responses import conversation
from rlcore_agents.nemo_gym.settings import NeMoGymData

COLUMN = "nemo_gym_row"


def nemo_gym(options: NeMoGymData) -> dict[str, list[dict[str, Any]]]:
    """Take rows of a data set of NeMo Gym, for rollout.environment=nemo_gym."""
    sources = {"train": options.source, "test": options.test_source}
    return {split: _rows(Path(source), split) for split, source in sources.items() if source is not None}


def _rows(source: Path, split: str) -> list[dict[str, Any]]:
    with boundary(f"{source} cannot be read"):
        lines = source.expanduser().read_text(encoding="utf-8").splitlines()
    return [_row(line, f"{source}, line {number}", split, number - 1) for number, line in enumerate(lines, 1) if line]


def _row(line: str, where: str, split: str, index: int) -> dict[str, Any]:
    """Return a row; the verifier gets the line of the file, to which nothing may be added by types of columns."""
    with boundary(f"{where} is no row of NeMo Gym"):
        row = json.loads(line)
        messages = conversation(row["responses_create_params"])
    agent = row.get("agent_ref") or {}
    return {
        "prompt": messages,
        "data_source": f"nemo_gym/{agent.get('name', 'default')}",
        "extra_info": {COLUMN: line, "split": split, "index": index},
    }


def row_of(sample: PromptSample) -> dict[str, Any]:
    """Return the row that `nemo_gym` wrote.

    Raises:
        DataError: the sample is another one.
    """
    text = sample.extra.get(COLUMN)
    if not isinstance(text, str):
        raise DataError(
            f"sample {sample.index} has no {COLUMN}; make its file with: rlcore data nemo-gym --source FILE"
        )
    return dict(json.loads(text))
