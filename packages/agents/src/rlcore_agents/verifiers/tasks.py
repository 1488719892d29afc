"""Tasks of a task set as rows of a data file, and back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rlcore.boundary import boundary
from rlcore.engines.episode import PromptSample
from rlcore.errors import DataError
from rlcore_agents.verifiers.environment import load_tasks
from rlcore_agents.verifiers.settings import VerifiersData

if TYPE_CHECKING:
    from verifiers.v1 import Env, Task

COLUMN = "verifiers_task"


def verifiers(options: VerifiersData) -> dict[str, list[dict[str, Any]]]:
    """Take the tasks of an installed task set of verifiers, for rollout.environment=verifiers."""
    tasks = load_tasks(options.taskset, options.config)
    wanted = options.n + options.test
    with boundary(f"taskset {options.taskset} cannot be read"):
        if options.shuffle and tasks.bounded:
            tasks = tasks.shuffle(options.seed)
        elif options.shuffle:
            tasks = tasks.take(wanted).shuffle(options.seed)
        rows = [_row(options.taskset, task) for task in tasks.take(wanted)]
    if len(rows) <= options.test:
        raise DataError(f"taskset {options.taskset} has only {len(rows)} tasks, and test={options.test} are asked for")
    split = len(rows) - options.test
    splits = {"train": rows[:split], "test": rows[split:]}
    return {name: part for name, part in splits.items() if part}


def task_of(env: Env[Any], sample: PromptSample) -> Task[Any, Any, Any]:
    """Return the task that a row of `verifiers` names.

    Raises:
        DataError: the row names none, or one of another task set.
    """
    text = sample.extra.get(COLUMN)
    taskset = env.config.taskset.id
    where = f"sample {sample.index} of rollout.environment=verifiers"
    if not isinstance(text, str):
        raise DataError(f"{where} has no {COLUMN}; make its file with: rlcore data verifiers --taskset {taskset}")
    with boundary(f"{where}: {COLUMN} cannot be read"):
        stored = json.loads(text)
        if stored["taskset"] != taskset:
            raise DataError(f"{where} is a task of {stored['taskset']!r}, but env.taskset.id is {taskset!r}")
        kind = type(env.taskset).task_type()
        return kind(kind.data_type().model_validate(stored["data"]), env.config.taskset.task)


def _row(taskset: str, task: Task[Any, Any, Any]) -> dict[str, Any]:
    """Return one row; its prompt is what people see, and by which lengths are estimated."""
    from verifiers.v1.dialects.chat import message_to_wire

    data = task.data
    given = data.prompt if isinstance(data.prompt, list) else []
    prompt = [message_to_wire(message) for message in given]
    if not prompt:
        prompt = [{"role": "user", "content": data.prompt or data.description or data.name or f"task {data.idx}"}]
    if data.system_prompt:
        prompt = [{"role": "system", "content": data.system_prompt}, *prompt]
    stored = {"taskset": taskset, "data": data.model_dump(mode="json")}
    return {
        "prompt": [{"role": message["role"], "content": _text(message["content"])} for message in prompt],
        "ground_truth": "",
        "data_source": taskset,
        "extra_info": {COLUMN: json.dumps(stored), "index": data.idx},
    }


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)
