"""The README's first command, as a newcomer runs it.

Its learning curve takes minutes: the tests train the first `STEPS` steps; ``nox -s quickstart`` trains all 140.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

RLCORE = (sys.executable, "-m", "rlcore")
STEPS = int(os.environ.get("QUICKSTART_STEPS", "30"))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=840)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("newcomer")
    done = run(*RLCORE, "quickstart", f"--steps={STEPS}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "rlcore-quickstart"


@pytest.mark.slow
def test_the_model_visibly_learns(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["accuracy_sft"], summary["accuracy_rl"]
    assert 0.25 < before < 0.75
    assert after > (0.9 if STEPS == 140 else 1.4 * before)


@pytest.mark.slow
def test_it_leaves_curves_samples_and_metrics(folder: Path) -> None:
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = (folder / "samples.md").read_text()
    assert "before, " in samples
    assert "after, " in samples
    steps = [json.loads(line)["step"] for line in (folder / "grpo/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS + 1))


@pytest.mark.slow
def test_transformers_loads_the_model_and_it_answers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "grpo/model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "grpo/model")
    question = {"role": "user", "content": "Ada has 12 beads. Ada buys 34 more. How many beads does Ada have now?"}
    prompt = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "####" in tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.slow
def test_the_printed_command_goes_on(folder: Path) -> None:
    command = json.loads((folder / "summary.json").read_text())["continue"]
    program, *arguments = shlex.split(command)
    assert program == "rlcore"
    done = run(*RLCORE, *arguments, f"trainer.total_steps={STEPS + 1}", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert f"continuing after step {STEPS}" in done.stderr


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = run(*RLCORE, "quickstart", "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "not an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
