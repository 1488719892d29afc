"""What is mutated, and the command that then reads it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fuzz import mutations
from fuzz.commands import Commands
from fuzz.mutations import Mutation
from rlcore_kit.testing.tiny_model import tiny_model

STEP = "run/checkpoints/step-000001"
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str))
"""
SFT: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"train_files": ["train.jsonl"], "train_batch_size": 2, "max_length": 64},
    "trainer": {"out_dir": "run", "trackers": ["jsonl"], "total_steps": 1, "save_freq": 1, "async_save": False},
}
VERL: dict[str, Any] = {
    "defaults": ["ppo_trainer", "_self_"],
    "algorithm": {"adv_estimator": "grpo"},
    "data": {"train_files": ["train.parquet"], "val_files": "test.parquet", "train_batch_size": 2},
    "actor_rollout_ref": {
        "model": {"path": "model"},
        "actor": {"optim": {"lr": 1e-6}, "ppo_mini_batch_size": "${data.train_batch_size}"},
        "rollout": {"name": "hf", "n": 2},
    },
    "trainer": {"logger": ["console"], "total_epochs": 1},
}
SCRIPT = """#!/bin/bash
set -x
MODEL=${MODEL:-model}  # a folder
LENGTH=$((1024 * 2))
DATA=(
    data.train_files="['train.parquet']"
    data.val_files=test.parquet
    data.max_prompt_length=$LENGTH
)
if [ -n "$MODEL" ]; then EXTRA=trainer.logger=['console']; fi
python3 -m verl.trainer.main_ppo "${DATA[@]}" algorithm.adv_estimator=grpo \\
    actor_rollout_ref.model.path=$MODEL actor_rollout_ref.rollout.name=hf actor_rollout_ref.rollout.n=2 \\
    $EXTRA "$@" 2>&1 | tee log_$(date +%s).txt
"""
GRPO: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {
        "train_files": ["train.jsonl"],
        "val_files": ["test.jsonl"],
        "train_batch_size": 2,
        "max_prompt_length": 48,
        "max_response_length": 4,
    },
    "rollout": {"n": 2},
    "reward": {"path": "reward.py:compute_score", "workers": 1},
    "trainer": {
        "out_dir": "new",
        "trackers": ["jsonl"],
        "total_steps": 1,
        "test_freq": 1,
        "val_before_train": False,
        "save_hf": True,
    },
}
COMMANDS = {
    "resume": ["run", "sft", "--config", "sft.yaml", "trainer.total_steps=2"],
    "train": ["run", "grpo", "--config", "grpo.yaml"],
    "train on Parquet": ["run", "grpo", "--config", "grpo.yaml", "data.train_files=[train.parquet]"],
    "train on CSV": ["run", "grpo", "--config", "grpo.yaml", "data.train_files=[train.csv]"],
    "train on compressed JSON": ["run", "grpo", "--config", "grpo.yaml", "data.train_files=[train.json.gz]"],
    # what bounds the work, and what says where metrics are, is not mutated
    "train as configured": [
        *["run", "grpo", "--config", "grpo.yaml", "trainer.total_steps=1", "data.train_batch_size=2"],
        *["data.max_response_length=4", "data.max_prompt_length=48", "rollout.n=2", "reward.workers=1"],
        *["trainer.out_dir=new", "trainer.trackers=[jsonl]"],
    ],
    "translate a script": ["from-verl", "run.sh", "--check"],
    "translate verl's YAML": ["from-verl", "verl.yaml", "--check"],
    "validate": ["config", "validate", "grpo", "--config", "grpo.yaml"],
}

# What is there is not what it says it is.
DAMAGED = "a folder|a FIFO|endless|a link|a dangling|empty|a pi|only|brackets|braces|cut"


@dataclass(frozen=True)
class Target:
    """A file, the command that reads it, and the mutations after which that command must not end well.

    Attributes:
        format: "json", "jsonl", "safetensors", "parquet", "yaml" or "text".
        needed: the command cannot do without the file.
        guarded: every change of the file is noticed, by a checksum.
        refused: pattern of further mutations that must not end well.
    """

    path: str
    command: str
    format: str
    needed: bool = True
    guarded: bool = False
    refused: str = "never"

    def mutations(self, base: Path) -> dict[str, Mutation]:
        """By name."""
        file = base / self.path
        special: dict[str, Callable[[Path], dict[str, Mutation]]] = {
            "json": mutations.json_mutations,
            "jsonl": jsonl_mutations,
            "safetensors": lambda path: mutations.safetensors_mutations(path) | mutations.tensor_mutations(path),
            "parquet": parquet_mutations,
            "yaml": yaml_mutations,
            "text": lambda path: {},
        }
        everywhere = mutations.kinds() | mutations.contents() | mutations.cuts() | mutations.damage()
        return everywhere | special[self.format](file)

    def must_fail(self, name: str) -> bool:
        """Whether the command must not end well after the mutation ``name``."""
        if re.match(self.refused, name) or self.guarded:
            return True
        if name in mutations.kinds() or name in mutations.contents():
            return self.needed
        if name in mutations.cuts():
            return self.needed and self.format in ("json", "safetensors", "parquet")
        return self.format == "safetensors" and name in (*mutations.LIES, *mutations.MISFITS)


TARGETS = [
    Target(f"{STEP}/manifest.json", "resume", "json"),
    Target(f"{STEP}/state.json", "resume", "json", guarded=True),
    Target(f"{STEP}/actor/checkpoint.json", "resume", "json", guarded=True),
    Target(f"{STEP}/actor/rank-00000.safetensors", "resume", "safetensors", guarded=True),
    Target("run/config.yaml", "resume", "text", needed=False),
    Target("run/metrics.jsonl", "resume", "text", needed=False),
    Target("model/config.json", "train", "json"),
    Target(
        "model/generation_config.json",
        "train",
        "json",
        needed=False,
        refused=rf"{DAMAGED}|as UTF-16|\$ is (?!object)"
        r"|\$\.eos_token_id is (negative|huge|infinite|nan|fraction|.*text|list|object|nested)",
    ),
    Target("model/model.safetensors", "train", "safetensors"),
    Target("model/tokenizer.json", "train", "json"),
    Target(
        "model/tokenizer_config.json", "train", "json", needed=False, refused=rf"{DAMAGED}|as UTF-16|\$ is (?!object)"
    ),
    Target("model/chat_template.jinja", "train", "text", needed=False, refused=r"a f|endless|a link|a dangling"),
    Target("train.jsonl", "train", "jsonl"),
    Target("test.jsonl", "train", "jsonl"),
    Target("train.parquet", "train on Parquet", "parquet"),
    Target("train.csv", "train on CSV", "text"),
    Target("train.json.gz", "train on compressed JSON", "text", refused="cut|twice"),
    Target("grpo.yaml", "validate", "yaml"),
    Target("grpo.yaml", "train as configured", "yaml"),
    Target("run.sh", "translate a script", "text"),
    Target("verl.yaml", "translate verl's YAML", "yaml"),
]


def trained(folder: Path, command: str) -> str | None:
    """What a run that ended well lacks; None for other commands."""
    if COMMANDS[command][0] != "run":
        return None
    out_dir, step = ("run", 2) if command == "resume" else ("new", 1)
    metrics = folder / out_dir / "metrics.jsonl"
    if not metrics.is_file():
        return "it ended well without metrics"
    last = metrics.read_text().splitlines()[-1:]
    return None if last and json.loads(last[0])["step"] == step else f"it ended well without metrics of step {step}"


def make_base(folder: Path, commands: Commands) -> None:
    """A model, data, configurations and a finished run of one step."""
    import pyarrow
    import pyarrow.parquet

    tiny_model(folder / "model", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    (folder / "reward.py").write_text(REWARD)
    rows = [_row(number) for number in range(4)]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    (folder / "train.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (folder / "train.csv").write_text("prompt,ground_truth\n" + "".join(f'"say {n}",x\n' for n in range(4)))
    for name, values in (("sft", SFT), ("grpo", GRPO)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    (folder / "run.sh").write_text(SCRIPT)
    (folder / "verl.yaml").write_text(yaml.safe_dump(VERL))
    ended = commands.run(["run", "sft", "--config", "sft.yaml"], folder)
    assert ended.code == 0, ended.output
    assert (folder / STEP / "manifest.json").is_file()


def copy_of(base: Path, folder: Path) -> Path:
    return shutil.copytree(base, folder, symlinks=True)


def _row(number: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"say {number}"}],
        "response": "abc",
        "ground_truth": "x",
        "data_source": "letters",
        "extra_info": {"index": number},
    }


def jsonl_mutations(path: Path) -> dict[str, Mutation]:
    """The second row with odd values."""
    first, second, *rest = path.read_text().splitlines()
    found = {}
    for name, row in mutations.json_values(json.loads(second)):
        lines = [first, json.dumps(row), *rest]
        found[f"row 1: {name}"] = mutations.write("\n".join(lines).encode())
    return found


def parquet_mutations(path: Path) -> dict[str, Mutation]:
    """Tables whose columns have odd types."""
    import pyarrow
    import pyarrow.parquet

    odd: dict[str, list[Any]] = {
        "nulls": [None] * 4,
        "integers": [1, 2, 3, 4],
        "floats": [1.5, float("nan"), float("inf"), -0.0],
        "truth values": [True, False, None, True],
        "bytes": [b"\xff", b"", b"\0", b"x"],
        "empty texts": [""] * 4,
        "lists of integers": [[1], [], [2], [3]],
        "empty lists": [[]] * 4,
        "objects": [{"a": 1}] * 4,
        "messages without a role": [[{"content": "x"}]] * 4,
        "messages without content": [[{"role": "user"}]] * 4,
        "null contents": [[{"role": "user", "content": None}]] * 4,
        "integer contents": [[{"role": "user", "content": 1}]] * 4,
        "unknown roles": [[{"role": "x", "content": "y"}]] * 4,
    }

    def table(column: str, values: list[Any]) -> Mutation:
        def mutate(path: Path) -> None:
            columns = {key: [_row(number)[key] for number in range(4)] for key in _row(0)}
            pyarrow.parquet.write_table(pyarrow.table({**columns, column: values}), path)

        return mutate

    columns = ("prompt", "ground_truth", "data_source", "extra_info", "unused")
    return {f"{column} of {name}": table(column, values) for column in columns for name, values in odd.items()}


def yaml_mutations(path: Path) -> dict[str, Mutation]:
    """YAML that is hostile, or says something odd."""
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
    )
    text = yaml.safe_dump(GRPO)
    whole = {
        "an alias bomb": bomb,
        "an alias of itself": text + "b: &b [*b]\n",
        "a merge bomb": bomb + "<<: *a11\n",
        "a control character": text + "seed: \x07\n",
        "a tag of Python": text + "seed: !!python/object/apply:os.system ['true']\n",
        "a timestamp": text + "seed: !!timestamp x\n",
        "binary": text + "seed: !!binary aGk=\n",
        "a set": text + "seed: !!set {a, b}\n",
        "an unknown tag": text + "seed: !x y\n",
        "two documents": text + "---\n" + text,
        "a key twice": text + text,
        "a key that is a list": text + "? [a, b]\n: c\n",
        "a key that is a number": text + "1: 2\n",
        "a key that is null": text + "null: 2\n",
        "a key that is a float": text + ".nan: 2\n",
        "an empty key": text + '"": 2\n',
        "defaults of itself": text + "defaults: grpo.yaml\n",
        "defaults of a folder": text + "defaults: model\n",
        "defaults of nothing": text + "defaults: nowhere.yaml\n",
        "defaults of a device": text + "defaults: /dev/zero\n",
        "defaults of a list": text + "defaults: [[grpo.yaml]]\n",
        "defaults of null": text + "defaults: null\n",
        "a tab": text + "\tseed: 1\n",
        "a long text": text + f"seed: {'x' * 1_000_000}\n",
        "a long integer": text + f"seed: {'1' * 10_000}\n",
    }
    dumped = {name: yaml.safe_dump(values, allow_unicode=False) for name, values in mutations.json_values(GRPO)}
    return {name: mutations.write(content.encode()) for name, content in {**whole, **dumped}.items()}
