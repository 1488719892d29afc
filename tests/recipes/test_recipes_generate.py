"""`rlcore generate` and `rlcore chat`: prompts and conversations with models and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlcore.cli.command_tree import cli
from rlcore_kit.testing.inference_peer import OpenAIPeer

SFT = dict.fromkeys(
    ["data.max_prompt_length", "rollout.n", "reward.path", "reward.workers", "data.max_response_length"]
)


@pytest.fixture(scope="module")
def run(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of supervised fine-tuning, with a checkpoint and the model that it is."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    changes = {**SFT, "trainer.total_steps": 1, "trainer.save_freq": 1, "trainer.save_hf": True}
    changes |= {"actor.optim.lr": 1e-2, "data.system_prompt": "be brief"}
    result = task.run("sft", folder, changes)
    assert result.exit_code == 0, result.output
    return folder


def call(*arguments: Any, code: int = 0, stdin: str | None = None) -> str:
    result = CliRunner().invoke(cli, [*map(str, arguments)], input=stdin, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def greedy(model: Path, messages: list[dict[str, str]], tokens: int) -> str:
    """What transformers' own generation answers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    causal: Any = AutoModelForCausalLM.from_pretrained(model)
    made = causal.generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_checkpoint_completes_a_prompt_under_its_runs_settings(run: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    expected = greedy(run / "model", [system, {"role": "user", "content": "say 1, 2"}], 6)
    assert call("generate", run, "--prompt", "say 1, 2", "--max-tokens", 6) == f"{expected}\n"
    assert call("generate", run / "model", "--prompt", "say 1, 2", "--max-tokens", 6) != f"{expected}\n"


def test_a_file_of_prompts(task: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "a, b.jsonl", tmp_path / "new" / "out.parquet"
    rows = [{"prompt": [{"role": "user", "content": f"say {n}"}], "ground_truth": n, "level": "easy"} for n in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("generate", task.model, "--file", source, "-n", 2, "--temperature", 0.8, "--max-tokens", 5)
    call(*arguments, "--out", out, "data.val_batch_size=2")
    found = pq.read_table(out).to_pylist()
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert [(row["ground_truth"], row["level"]) for row in found] == [(0, "easy"), (1, "easy"), (2, "easy")]
    for row in found:
        assert len(row["completions"]) == len(row["finish_reasons"]) == 2
        assert all(1 <= count <= 5 for count in row["completion_tokens"])
    assert "exists already" in call(*arguments, "--out", out, code=1)
    lines = tmp_path / "out.jsonl"
    call(*arguments, "--out", lines)
    again = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["completions"] for row in again] == [row["completions"] for row in found], "seeds are the prompts'"
    printed = call(*arguments)
    assert printed.count("--- prompt") == 6


def test_a_conversation_from_a_pipe(run: Path) -> None:
    lines = ["hello", "more", "/system be long", "hello", "/nonsense", "/quit", "never read"]
    printed = call("chat", run, "--max-tokens", 4, stdin="\n".join(lines) + "\n")
    system, user = {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}
    first = greedy(run / "model", [system, user], 4).strip()
    messages = [system, user, {"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    second = greedy(run / "model", messages, 4).strip()
    third = greedy(run / "model", [{"role": "system", "content": "be long"}, user], 4).strip()
    expected = "".join(f"{answer} […]\n" for answer in (first, second, third))
    assert printed == expected


def test_a_conversation_that_is_too_long_is_reset(task: Any) -> None:
    lines = ["x" * 100, "/reset", "hello"]
    printed = call("chat", task.model, "data.max_prompt_length=60", "--max-tokens", 2, stdin="\n".join(lines))
    first, second = printed.splitlines()
    assert first.startswith("[no answer: the conversation has")
    assert "/reset begins a new conversation" in first
    assert second.endswith("[…]")


def test_a_server_answers_as_the_model_does(task: Any, tmp_path: Path) -> None:
    peer = OpenAIPeer(task.model)
    here: list[str] = []
    there = ["--url", peer.url]
    keys = [f"data.val_files={task.val}", "data.max_prompt_length=32", "data.max_response_length=6"]
    keys.append(f"reward.path={task.reward}:compute_score")
    said: list[str] = []
    measured: list[Any] = []
    try:
        for more in (here, there):
            said.append(call("generate", task.model, "--prompt", "say 3", "--max-tokens", 6, *more))
            chat = ("chat", task.model, "--max-tokens", 6, "data.max_prompt_length=99", *more)
            said.append(call(*chat, stdin="say 3\n"))
            out = tmp_path / str(len(measured))
            call("eval", task.model, "--out", out, *keys, *more)
            measured.append(json.loads((out / "results.json").read_text())["models"])
    finally:
        peer.stop()
    assert said[:2] == said[2:]
    assert measured[0] == measured[1]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no model": (["generate", "MODELx", "--prompt", "a"], "there is no such folder; did you mean MODEL?"),
    "nothing to complete": (["generate", "MODEL"], "give --prompt or --file"),
    "an empty prompt": (["generate", "MODEL", "--prompt", "say", "--file", "gone.jsonl"], "does not exist"),
    "an unknown ending": (["generate", "MODEL", "--prompt", "a", "--out", "x.csv"], "known are .parquet and .jsonl"),
    "greedy samples": (["generate", "MODEL", "--prompt", "a", "-n", "2"], "the n=2 completions of a prompt would be"),
    "a step of a model": (["chat", "MODEL", "--step", "2"], "is a model and has no checkpoints"),
    "an engine that is not installed": (["chat", "MODEL", "rollout.engine=vlm"], "vllm"),
    "a server with a checkpoint": (["chat", "RUN", "--url", "http://127.0.0.1:1"], "name that model alone"),
    "a prompt that is too long": (
        ["generate", "MODEL", "--prompt", "word " * 99, "data.max_prompt_length=10"],
        "--prompt 1 has",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(task: Any, run: Path, case: str) -> None:
    words, says = MISTAKES[case]
    names = {"MODEL": str(task.model), "RUN": str(run)}
    for name, path in names.items():
        words, says = [word.replace(name, path) for word in words], says.replace(name, path)
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code in (1, 2)
    assert says in result.output
