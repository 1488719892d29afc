"""reasoning-gym: the problems of every task, their scores, and a run on them."""

from __future__ import annotations

import ast
import inspect
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import reasoning_gym
from click.testing import CliRunner, Result

from rlcore import plugins
from rlcore.cli.command_tree import cli
from rlcore.engines.reward import Reward, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_agents.reasoning_gym import evaluated
from rlcore_agents.reasoning_gym.data_set import reasoning_gym as make_data
from rlcore_agents.reasoning_gym.scoring import score
from rlcore_agents.reasoning_gym.settings import ReasoningGymData
from rlcore_kit.testing.tiny_model import tiny_model

TASKS = sorted(reasoning_gym.factory.DATASETS.keys() - {"composite"})

Row = dict[str, Any]


def data(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["data", "reasoning-gym", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Two problems of every task, as they are read from the file."""
    folder = tmp_path_factory.mktemp("data")
    result = data("--task", "all", "--n", 2 * len(TASKS), "--seed", 3, "--out", folder)
    assert result.exit_code == 0, result.output
    read: list[Row] = pq.read_table(folder / "train.parquet").to_pylist()
    return read


def answered(row: Row, completion: str, extraction: str = "tag") -> float:
    return score(sample_of(row, completion), extraction).score


def sample_of(row: Row, completion: str) -> RewardSample:
    return RewardSample(row["prompt"], completion, row["ground_truth"], row["data_source"], row["extra_info"])


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_scored_as_the_library_does(name: str, rows: list[Row]) -> None:
    mine = [row for row in rows if row["extra_info"]["task"] == name]
    assert len(mine) == 2
    for row in mine:
        assert row["data_source"] == f"reasoning_gym/{name}"
        problems = reasoning_gym.create_dataset(name, **json.loads(row["extra_info"]["config"]), size=200)
        entry = problems[row["extra_info"]["source_index"]]
        truth = row["ground_truth"]
        for answer in (truth, "nonsense", "1"):
            completion = "Let me see." if answer is None else f"<answer>no</answer> or\n<answer>{answer}</answer>."
            try:
                expected = problems.score_answer(answer, {**entry, "answer": truth})
            except (ValueError, TypeError):  # two scorers do not check what they read
                expected = problems.score_answer(None, entry)
            assert answered(row, completion) == pytest.approx(expected)
        if truth is not None:
            assert answered(row, f"<answer>{truth}</answer>") == 1
            assert answered(row, f" {truth}\n", "whole") == 1


def test_the_same_seed_makes_the_same_rows_in_every_process(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    # tasks that iterate over sets of text
    tasks = "isomorphic_strings,knight_swap,polynomial_multiplication,ransom_note,word_ladder"
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    made = make_data(ReasoningGymData(task=tasks, n=10, test=5, seed=3))
    by_question = {row["prompt"][0]["content"]: row for row in rows}
    for row in made["train"]:
        known = by_question[row["prompt"][0]["content"]]
        assert row["extra_info"]["entry"] == known["extra_info"]["entry"]
    questions = {row["prompt"][0]["content"] for row in made["train"]}
    assert len(questions) == 10
    assert questions.isdisjoint(row["prompt"][0]["content"] for row in made["test"])


def test_entries_keep_types_that_json_does_not(rows: list[Row]) -> None:
    [row, _] = [row for row in rows if row["extra_info"]["task"] == "arc_agi"]
    board = ast.literal_eval(row["extra_info"]["entry"])["metadata"]["output"]
    assert isinstance(board, tuple)


def test_tasks_whose_scorers_evaluate_answers_are_known() -> None:
    evaluating = {"eval": set[str](), "parse_expr": set[str]()}
    for name in TASKS:
        text = Path(inspect.getfile(reasoning_gym.factory.DATASETS[name][0])).read_text()
        scorer = text.partition("def score_answer")[2]
        for function, names in evaluating.items():
            if re.search(rf"(?<!\w){function}\((user_)?answer", scorer):
                names.add(name)
    assert evaluating == {"eval": evaluated.EVAL, "parse_expr": evaluated.FORMULA}


@pytest.mark.parametrize("name", sorted(evaluated.EVAL | evaluated.FORMULA))
def test_scorers_do_not_run_what_the_policy_writes(
    name: str, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = next(row for row in rows if row["extra_info"]["task"] == name)
    for code in ("__import__('os').mkdir('made')", "[open(chr(97), 'w')]", "().__class__.__base__", "exit()"):
        answer = f"<answer>{code}</answer>"
        assert answered(row, answer) <= 0.05
    assert not list(tmp_path.iterdir())
    assert score(sample_of(row, "<answer>exit()</answer>"), "tag").extras == {"correct": 0, "answered": 1, "refused": 1}


def test_formulas_and_boards_of_many_forms_may_be_evaluated() -> None:
    for formula in ("x**2*sin(3*x)/2 - 4.5*log(x) + C", "(8 - 2)*4/1", "3*x^2 - x_1*y", "exp(-x)*sqrt(2)"):
        assert evaluated.may_be_evaluated("simple_integration", formula)
    for board in ("[['Q', '_'], ['_', 'Q']]", "[(1, 2), (3, 4)]", "Q _\n_ Q"):
        assert evaluated.may_be_evaluated("n_queens", board)


@pytest.fixture(scope="module")
def reward() -> Reward:
    plugin = plugins.get("rlcore.rewards", "reasoning_gym")
    return plugin.build(plugin.config_class()(), RewardSettings(workers=1))  # type: ignore[no-any-return]


def test_the_reward_scores_a_mixture_in_its_pool(reward: Reward, rows: list[Row]) -> None:
    chosen = random.Random(0).sample([row for row in rows if row["ground_truth"] is not None], 20)
    right = reward.score_batch([sample_of(row, f"<answer>{row['ground_truth']}</answer>") for row in chosen])
    assert [result.score for result in right] == [1.0] * len(chosen)
    assert all(result.extras == {"correct": 1, "answered": 1, "refused": 0} for result in right)
    bare = sample_of(chosen[0], str(chosen[0]["ground_truth"]))
    other = RewardSample([{"role": "user", "content": "?"}], "<answer>1</answer>", "1")
    unanswered, failed = reward.score_batch([bare, other])
    assert (unanswered.score, unanswered.extras["answered"], unanswered.error) == (0, 0, None)
    assert failed.error == "exception"
    reward.close()


MISTAKES = [
    ("--task chain_summ --n 5", "no task 'chain_summ'; did you mean chain_sum"),
    ("--task chain_sum --n 5 --config min_trms=3", "no parameter 'min_trms'; it has min_terms, max_terms"),
    ("--task chain_sum,gcd --n 5 --config min_terms=3", "write chain_sum.min_terms=… for one of them"),
    ("--task chain_sum --n 5 --config min_terms=30", "AssertionError: max_terms must be >= min_terms"),
    ("--task chain_sum --n 5 --config seed=3", "set --seed instead"),
    ("--task coin_flip --n 1000", "found only 260 different problems of the task coin_flip"),
]


def test_mistakes_are_one_sentence_each(tmp_path: Path) -> None:
    from rlcore_agents.reasoning_gym.generation import generate

    for words, message in MISTAKES:
        given = dict(zip(words.split()[::2], words.split()[1::2], strict=True))
        key, _, value = given.get("--config", "").partition("=")
        config = {key: int(value)} if key else {}
        with pytest.raises(Exception, match=re.escape(message)) as caught:
            generate(task=given["--task"], n=int(given["--n"]), test=0, seed=0, config=config)
        assert "\n" not in str(caught.value)
    assert "no task 'gcdd'; did you mean gcd" in data("--task", "gcdd", "--n", "1", "--out", tmp_path).output


def test_a_recipe_trains_on_two_tasks(tmp_path: Path) -> None:
    parameters = ("--config", "chain_sum.max_terms=2", "--config", "gcd.max_numbers=2")
    made = data("--task", "chain_sum,gcd", "--n", 4, "--test", 2, *parameters, "--out", tmp_path / "data")
    assert made.exit_code == 0, made.output
    keys = {
        "model.path": tiny_model(tmp_path / "model"),
        "data.train_files": tmp_path / "data" / "train.parquet",
        "data.val_files": tmp_path / "data" / "test.parquet",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 300,
        "data.max_response_length": 8,
        "rollout.n": 2,
        "reward.name": "reasoning_gym",
        "reward.workers": 1,
        "trainer.trackers": "[jsonl]",
        "trainer.total_steps": 1,
        "trainer.test_freq": 1,
        "trainer.val_before_train": False,
        "trainer.out_dir": tmp_path / "run",
    }
    words = [f"{key}={value}" for key, value in keys.items()]
    result = CliRunner().invoke(cli, ["run", "grpo", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {name for line in metrics for name in line}
    assert {"val-core/reasoning_gym/gcd/reward/mean@1", "reward/refused"} <= logged, sorted(logged)
    assert all(line.get("reward/error_ratio", 0) == 0 for line in metrics)
