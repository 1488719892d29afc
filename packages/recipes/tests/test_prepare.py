"""Preparation of data sets, and the command that runs it."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from datasets import Dataset, DatasetDict

from rlcore.cli.command_tree import cli
from rlcore.errors import ConfigError, DataError
from rlcore_recipes.data.command import data
from rlcore_recipes.data.prepare import write_splits
from rlcore_recipes.data.prepare.arithmetic import LEVELS, ArithmeticTask, arithmetic_problems
from rlcore_recipes.data.prepare.math import last_boxed


def run(*arguments: object) -> Result:
    return CliRunner().invoke(data, [str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


GSM8K = {"question": "How many?", "answer": "500 * 2 = <<500*2=1000>>1000\n#### 1,000"}


def test_gsm8k(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "train.jsonl", [GSM8K, {**GSM8K, "answer": "#### -3"}])
    pq.write_table(pa.Table.from_pylist([GSM8K]), tmp_path / "in" / "test.parquet")
    result = run("gsm8k", "--source", tmp_path / "in", "--out", tmp_path / "out", "--instruction", "Go.")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0].endswith("train.parquet: 2 rows")
    first, second = rows(tmp_path / "out" / "train.parquet")
    assert first == {
        "prompt": [{"role": "user", "content": "How many? Go."}],
        "ground_truth": "1000",
        "data_source": "openai/gsm8k",
        "extra_info": {"split": "train", "index": 0, "question": "How many?"},
        "response": GSM8K["answer"],
    }
    assert second["ground_truth"] == "-3"
    assert len(rows(tmp_path / "out" / "test.parquet")) == 1


def test_existing_files_are_only_replaced_on_request(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "train.jsonl", [GSM8K])
    write_lines(tmp_path / "in" / "test.jsonl", [GSM8K])
    out = tmp_path / "out"
    out.mkdir()
    (out / "test.parquet").write_text("mine")
    result = run("gsm8k", "--source", tmp_path / "in", "--out", out)
    assert isinstance(result.exception, DataError)
    assert "test.parquet exist already; use --overwrite" in str(result.exception)
    assert [path.name for path in out.iterdir()] == ["test.parquet"]
    assert (out / "test.parquet").read_text() == "mine"
    assert run("gsm8k", "--source", tmp_path / "in", "--out", out, "--overwrite").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["test.parquet", "train.parquet"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "q"}, "row 0: field 'answer' must be text, not None; the row has question"),
        ({"question": "q", "answer": "no number"}, "train row 0: the answer does not end in '#### number'"),
    ],
)
def test_gsm8k_rows_that_do_not_fit(tmp_path: Path, line: dict, message: str) -> None:
    write_lines(tmp_path / "train.jsonl", [line])
    result = run("gsm8k", "--source", tmp_path, "--out", tmp_path / "out")
    assert isinstance(result.exception, DataError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    missing = run("gsm8k", "--source", tmp_path / "no", "--out", tmp_path / "out").exception
    assert f"the source folder {tmp_path / 'no'} does not exist" in str(missing)
    (tmp_path / "LICENSE").touch()
    empty = run("gsm8k", "--source", tmp_path, "--out", tmp_path / "out").exception
    assert "neither train.jsonl nor train.parquet, only LICENSE" in str(empty)


MATH = {
    "problem": "Half of $x$?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "First $\\boxed{1}$, no: $\\boxed{\\frac{1}{2}}$.",
}


@pytest.mark.parametrize("layout", ["lines", "folders", "lighteval"])
def test_math(tmp_path: Path, layout: str) -> None:
    for split in ("train", "test"):
        if layout == "lines":
            write_lines(tmp_path / f"{split}.jsonl", [MATH])
        elif layout == "lighteval":  # a copy of its repository: all problems, and those of each subject again
            for folder in ("data", "algebra"):
                (tmp_path / folder).mkdir(exist_ok=True)
                pq.write_table(pa.Table.from_pylist([MATH]), tmp_path / folder / f"{split}-00000-of-00001.parquet")
        else:
            (tmp_path / split / "algebra").mkdir(parents=True)
            (tmp_path / split / "algebra" / "1.json").write_text(json.dumps(MATH))
    assert run("math", "--source", tmp_path, "--out", tmp_path / "out").exit_code == 0
    [row] = rows(tmp_path / "out" / "train.parquet")
    assert row["ground_truth"] == "\\frac{1}{2}"
    assert row["extra_info"] == {"split": "train", "index": 0, "level": "Level 1", "type": "Algebra"}
    assert row["response"] == MATH["solution"]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"$\boxed{5}$", "5"),
        (r"$\boxed{\frac{\sqrt{3}}{2}}$ and more {braces}", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{a\\}", r"a\\"),
        (r"so $\fbox{7}$", "7"),
        (r"$\boxed{1}$ then $\boxed{ 2 }$", "2"),
        (r"$\boxed 9$.", "9"),
        (r"\boxed{open", None),
        ("none", None),
    ],
)
def test_last_boxed(solution: str, answer: str | None) -> None:
    assert last_boxed(solution) == answer


def test_math_without_box_names_the_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [MATH, {**MATH, "solution": "1"}])
    result = run("math", "--source", tmp_path, "--out", tmp_path / "out")
    assert "train row 1: the solution has no \\boxed answer" in str(result.exception)


def solve(question: str) -> int:
    """An independent reading of a generated question."""
    first, *sentences = re.split(r"[.?] ?", question)
    value = int(re.search(r"\d+", first)[0])  # type: ignore[index]
    for sentence in sentences:
        number = re.search(r"\d+", sentence)
        if number is None:
            continue
        if "times" in sentence:
            value *= int(number[0])
        elif re.search(r"buys|finds|gives \w+ \d+ more", sentence):
            value += int(number[0])
        else:
            value -= int(number[0])
        assert value >= 0
    return value


TASKS = [*LEVELS.values(), ArithmeticTask(steps=3, operations=("+", "-", "*"), columns=True, annotate=True, phrases=3)]


@pytest.mark.parametrize("task", TASKS, ids=["easy", "medium", "hard", "columns"])
def test_arithmetic_is_right(task: ArithmeticTask) -> None:
    splits = arithmetic_problems(task, 400, 100, seed=1)
    for row in [*splits["train"], *splits["test"]]:
        question, solution = row["prompt"][0]["content"], row["response"]
        assert solve(question) == int(row["ground_truth"])
        assert int(re.fullmatch(r"(?s).*\n#### (\d+)", solution)[1]) == int(row["ground_truth"])  # type: ignore[index]
        equations = re.findall(r"(\d+)([-+*])(\d+)(?:([-+])(\d+))?=(\d+)", solution.replace("<<", " "))
        assert len(equations) >= task.steps
        for left, sign, right, sign2, third, result in equations:
            tail = f"{sign2}{int(third)}" if sign2 else ""
            # the borrow of a subtraction is taken away, the carry of the others added: the sign is written out
            assert eval(f"{int(left)}{sign}{int(right)}{tail}") == int(result), solution


def test_padded_numbers_of_a_kind_are_equally_long() -> None:
    for row in arithmetic_problems(ArithmeticTask(), 500, 10, seed=0)["train"]:
        assert re.fullmatch(r"\d\d\+\d\d=(\d{3})\n#### \1", row["response"])


def test_arithmetic_splits_are_reproducible_and_disjoint() -> None:
    first, again, other = (arithmetic_problems(ArithmeticTask(), 2000, 200, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["test"] != other["test"]
    numbers = {
        split: {tuple(re.findall(r"\d+", row["prompt"][0]["content"])) for row in rows} for split, rows in first.items()
    }
    assert not numbers["train"] & numbers["test"]
    assert len(numbers["test"]) == 200
    assert len({row["prompt"][0]["content"] for row in first["train"]}) == 2000
    assert arithmetic_problems(ArithmeticTask(), 10, 200, 0)["test"] == first["test"]


def test_exhausted_task_says_so() -> None:
    with pytest.raises(DataError, match=r"found only 81 different problems for test=100"):
        arithmetic_problems(ArithmeticTask(digits=1), 10, 100, seed=0)
    with pytest.raises(DataError, match=r"for train=10 \(81 are held out\)"):
        arithmetic_problems(ArithmeticTask(digits=1), 10, 81, seed=0)


def test_arithmetic_command_and_its_errors(tmp_path: Path) -> None:
    arguments = ["arithmetic", "--out", tmp_path, "--train", 5, "--test", 3, "--seed", 2, "--level", "hard"]
    assert run(*arguments).exit_code == 0
    assert len(rows(tmp_path / "train.parquet")) == 5
    wrong = run("arithmetic", "--out", tmp_path, "--train", "many", "--level", "harder").exception
    assert isinstance(wrong, ConfigError)
    assert "train: must be a valid integer" in str(wrong)
    assert "level: must be 'easy', 'medium' or 'hard'" in str(wrong)


def test_own_data_set_as_the_documentation_has_it(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    code = re.search(r"```python\n(# riddles.py.*?)```", page, re.DOTALL)[1]  # type: ignore[index]
    (tmp_path / "riddles.py").write_text(f"from __future__ import annotations\n{code}")
    write_lines(tmp_path / "in" / "train.jsonl", [{"text": f"r{i}", "answer": str(i), "level": i} for i in range(3)])
    name = f"{tmp_path / 'riddles.py'}:riddles"
    result = run(name, "--source", tmp_path / "in", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / "out" / "train.parquet")[2]["extra_info"] == {"level": 2}


def test_own_data_set_with_a_required_option_and_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "needy.py"
    file.write_text(
        """
from pydantic import Field
from rlcore.config import Config

class Options(Config):
    max_count: int = Field(description="How many.")

def needy(options: Options):
    return {"train": [{"a": options.max_count}]}

def bare(options):
    return {}
"""
    )
    assert run(f"{file}:needy", "--max-count", 3, "--out", tmp_path / "out").exit_code == 0
    assert rows(tmp_path / "out" / "train.parquet") == [{"a": 3}]
    assert "Missing option '--max-count'" in run(f"{file}:needy", "--out", tmp_path).output
    assert "must be annotated with its options" in str(run(f"{file}:bare", "--out", tmp_path).exception)
    assert "has no function 'none'" in str(run(f"{file}:none", "--out", tmp_path).exception)
    assert "does not exist" in str(run(f"{tmp_path / 'no.py'}:none", "--out", tmp_path).exception)
    assert "No such command" in run("gsm9k", "--out", tmp_path).output


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("s3://bucket/a", "must be a file or folder on this machine, not a URL"),
        ("~missing-user/a", "there is no home folder ~missing-user"),
        (__file__, "is a file"),
    ],
)
@pytest.mark.parametrize("command", ["data arithmetic", "model new --train-files a.parquet", "quickstart"])
def test_a_folder_to_write_to_is_on_this_machine(command: str, out: str, message: str) -> None:
    result = CliRunner().invoke(cli, [*command.split(), "--out", out])
    assert result.exit_code == 2
    assert message in result.output


def test_home_folders_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("arithmetic", "--train", 2, "--test", 2, "--out", "~/data").exit_code == 0
    assert (tmp_path / "data" / "train.parquet").exists()


MAPS = """
def make_map_fn(split):
    def process_fn(example, idx):
        question = example.pop("question")
        return {"prompt": [{"role": "user", "content": question}],
                "reward_model": {"style": "rule", "ground_truth": example["answer"]},
                "extra_info": {"split": split, "index": idx}}
    return process_fn

def some(example):
    return example if example["answer"] > "1" else None

def keyed(example, index):
    return {"prompt": f"{index} {example['question']}"}

def broken(example): return example["nothing"]
def number(example): return 3
def no_function(split): return 3
def nothing(): ...

if __name__ == "__main__":
    def hidden(split): ...
"""


def convert(folder: Path, function: str, *options: object) -> Result:
    file = folder / "maps.py"
    file.write_text(MAPS)
    return run("convert", "--map", f"{file}:{function}", "--out", folder / "out", "--overwrite", *options)


def test_map_functions_of_verl_convert_all_splits(tmp_path: Path) -> None:
    source = tmp_path / "in" / "data"
    lines = [{"question": f"q{number}", "answer": str(number)} for number in range(3)]
    write_lines(source / "test.jsonl", lines[:1])
    for number in range(2):
        shard = source / f"train-0000{number}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(lines[number * 2 :][:2]), shard)
    result = convert(tmp_path, "make_map_fn", "--source", tmp_path / "in")
    assert result.exit_code == 0, result.output
    assert "train.parquet: 3 rows" in result.output
    assert rows(tmp_path / "out" / "train.parquet")[2] == {
        "answer": "2",
        "prompt": [{"role": "user", "content": "q2"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 2, "split": "train"},
    }
    assert rows(tmp_path / "out" / "test.parquet")[0]["extra_info"] == {"index": 0, "split": "test"}


def test_plain_map_functions(tmp_path: Path) -> None:
    lines = [{"question": f"q{number}", "answer": str(number)} for number in range(3)]
    DatasetDict({"train": Dataset.from_list(lines)}).save_to_disk(tmp_path / "saved")
    result = convert(tmp_path, "some", "--source", tmp_path / "saved")
    assert "train.parquet: 1 rows, 2 dropped" in result.output, result.exception
    assert rows(tmp_path / "out" / "train.parquet") == lines[2:]
    write_lines(tmp_path / "dev.jsonl", lines)
    assert convert(tmp_path, "keyed", "--source", tmp_path / "dev.jsonl").exit_code == 0
    assert rows(tmp_path / "out" / "dev.parquet")[1] == {**lines[1], "prompt": "1 q1"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "maps.py:broken on row 0 of split dev fails: KeyError: 'nothing'"),
        ("number", "maps.py:number on row 0 of split dev returns a int, not a dict or None"),
        ("no_function", "maps.py:no_function('dev') returns a int, not a function of (example, idx)"),
        ("nothing", "maps.py:nothing() must take (split), (example, idx) or (example)"),
        ("hidden", "at its top level; line 22 defines it inside another block"),
        ("other", "has no function 'other'; it has make_map_fn, some"),
    ],
)
def test_map_functions_that_do_not_fit(tmp_path: Path, function: str, message: str) -> None:
    write_lines(tmp_path / "dev.jsonl", [{"question": "q"}])
    result = convert(tmp_path, function, "--source", tmp_path / "dev.jsonl")
    assert message in str(result.exception)


def test_sources_that_cannot_be_converted(tmp_path: Path) -> None:
    assert "does not exist; did you mean" in str(convert(tmp_path, "some", "--source", tmp_path / "map.py").exception)
    assert "has no data files" in str(convert(tmp_path, "some", "--source", tmp_path).exception)
    for name in ("a", "b"):
        write_lines(tmp_path / "in" / name / "train.jsonl", [{"answer": name}])
    several = convert(tmp_path, "some", "--source", tmp_path / "in").exception
    assert "has data files in several folders" in str(several)
    assert convert(tmp_path, "some", "--source", tmp_path / "in", "--config", "b").exit_code == 0
    assert rows(tmp_path / "out" / "train.parquet") == [{"answer": "b"}]


def test_help_lists_data_sets() -> None:
    output = run("--help").output
    assert all(name in output for name in ("gsm8k", "math", "arithmetic", "convert"))


def test_write_splits_checks_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split 'train' has no rows"):
        write_splits({"train": []}, tmp_path)
    with pytest.raises(DataError, match="rows of split 'train' do not have the same types"):
        write_splits({"train": [{"a": 1}, {"a": "x"}]}, tmp_path)
    assert not list(tmp_path.iterdir())
