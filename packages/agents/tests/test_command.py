"""The environment ``command``: a program per episode, whose failures cost that episode alone."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlcore.cli.command_tree import cli
from rlcore.engines import ModelSettings, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec, PromptSample, Trajectory
from rlcore.errors import ConfigError, WorkerDied
from rlcore_agents.gateway.command import CommandEnvironment
from rlcore_agents.gateway.settings import CommandSettings

SAMPLE = PromptSample(
    [3], [{"role": "user", "content": "2+3?"}], ground_truth="5", extra={"level": 1}, index=4, position=7
)
ASK = """
import json, os, sys, urllib.request
sample = json.load(open(os.environ["RLCORE_SAMPLE"]))
def ask(messages, model="policy", key=os.environ["OPENAI_API_KEY"]):
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": model, "messages": messages}).encode(),
        {"Authorization": "Bearer " + key, "Content-Type": "application/json"},
    )
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
def result(**values):
    json.dump(values, open(os.environ["RLCORE_RESULT"], "w"))
"""
Run = Callable[..., Trajectory]


@pytest.fixture
def run(policy: Path, scripted: Any, tmp_path: Path) -> Run:
    """Run one episode of a program with this code, after `ASK`."""

    def episode(code: str, replies: Any = None, timeout_s: float = 20, turns: int = 4, **options: Any) -> Trajectory:
        program = tmp_path / "agent.py"
        program.write_text(ASK + code)
        if "function" not in options:
            options.setdefault("command", f"{sys.executable} {program}")
        limits = EpisodeLimits(turns, 500, 1000, timeout_s)
        settings = CommandSettings(**options)
        spec = EpisodeSpec(
            ModelSettings(path=str(policy)), settings, SamplingParams(50), limits, end_tokens=frozenset({1})
        )
        environment = CommandEnvironment(spec)
        engine = scripted(lambda prompt: "5") if replies is None else replies
        try:
            return asyncio.run(environment.run(engine, SAMPLE, seed=3))
        finally:
            environment.close()

    return episode


def test_a_program_gets_its_sample_and_gives_a_score(run: Run) -> None:
    trajectory = run("""
answer = ask(sample["messages"])
assert os.listdir(".") == [] and "SECRET" not in os.environ
result(score=float(answer == sample["ground_truth"]), info={"level": sample["extra"]["level"]})
""")
    assert not trajectory.invalid
    assert (trajectory.score, trajectory.info) == (1.0, {"level": 1})
    assert trajectory.messages[-1] == {"role": "assistant", "content": "5"}
    assert [len(segment.tokens) for segment in trajectory.segments if segment.sampled] == [2]
    assert trajectory.metrics["requests"] == trajectory.metrics["turns"] == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ask(sample['messages'])\nprint('no luck')\nsys.exit(3)", "with exit status 3. Its last output:\nno luck"),
        ("os.kill(os.getpid(), 9)", "the program was ended by SIGKILL. It printed nothing"),
        ("", "without a reply of the policy: its client must use the base URL in OPENAI_BASE_URL"),
        ("ask(sample['messages'], model='gpt-4o')", "request that was refused last: the model 'gpt-4o' does not exist"),
        ("ask(sample['messages'], key='sk-1')", "refused last: the API key is not that of episode 7-3-"),
        ("ask(sample['messages'])\nresult(score='high')", "to RLCORE_RESULT: score: Input should be a valid number"),
        ("ask(sample['messages'])\nresult(score=float('nan'))", "to RLCORE_RESULT: score:"),
        ("ask(sample['messages'])\nos.mkfifo(os.environ['RLCORE_RESULT'])", "is not a regular file"),
    ],
)  # fmt: skip
def test_a_program_that_fails_costs_its_episode(run: Run, code: str, message: str) -> None:
    trajectory = run(code)
    assert message in trajectory.invalid
    assert trajectory.score is None
    assert trajectory.segments[0].tokens


def test_what_was_sampled_before_a_failure_is_kept(run: Run) -> None:
    trajectory = run("ask(sample['messages'])\nsys.exit(1)")
    assert trajectory.invalid
    assert [segment.sampled for segment in trajectory.segments] == [False, True]


def running(pid: str) -> bool:
    """Whether a process has not ended; the system's first process collects the ended ones."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_timeout_ends_every_process_within_seconds(run: Run, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    start = time.monotonic()
    trajectory = run(
        f"""
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
stubborn = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"]
children = [subprocess.Popen(stubborn), subprocess.Popen(stubborn, start_new_session=True)]
open({str(pids)!r}, "w").write(" ".join(str(child.pid) for child in children) + f" {{os.getpid()}}")
sys.stdout.write("x" * 10_000_000)
time.sleep(100)
""",
        timeout_s=1.5,
        max_output_kb=1,
    )
    assert time.monotonic() - start < 1.5 + 5
    assert "took longer than 1.5 s (rollout.environment.timeout_s)" in trajectory.invalid
    assert len(trajectory.invalid) < 2500
    assert not [pid for pid in pids.read_text().split() if running(pid)]


def test_children_that_a_program_leaves_behind_are_ended(run: Run, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    trajectory = run(f"""
import subprocess
ask(sample["messages"])
child = subprocess.Popen(["sleep", "100"], start_new_session=True)
open({str(pid)!r}, "w").write(str(child.pid))
""")
    assert not trajectory.invalid
    assert not running(pid.read_text())


def test_a_program_that_fails_at_the_limit_is_truncated_and_not_invalid(run: Run) -> None:
    code = "messages = sample['messages']\nwhile True: ask(messages)"
    trajectory = run(code, turns=2, truncated_score=-1)
    assert (trajectory.invalid, trajectory.score, trajectory.finish_reason) == ("", -1.0, "length")
    assert trajectory.metrics["truncated"] == 1.0
    assert "exit status 1" in run(code, turns=2, truncated_score=None).invalid


def test_a_failure_of_the_engine_is_one_of_the_run(run: Run, scripted: Any) -> None:
    def dead(prompt: str) -> str:
        raise WorkerDied("rank 3 is gone")

    with pytest.raises(WorkerDied, match="rank 3 is gone"):
        run("ask(sample['messages'])", scripted(dead))


FUNCTION = """
import openai
async def agent(base_url, api_key, sample):
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        answer = await client.chat.completions.create(model=sample["model"], messages=sample["messages"])
    return GIVEN
"""


@pytest.mark.parametrize(
    ("given", "score", "invalid"),
    [
        ("answer.choices[0].message.content == sample['ground_truth']", 1.0, ""),
        ("{'score': 0.5, 'info': {'a': 1}}", 0.5, ""),
        ("None", None, ""),
        ("'five'", None, "agent returned neither a score nor"),
        ("1 / 0", None, "agent failed: ZeroDivisionError: division by zero"),
    ],
)
def test_an_async_function_is_an_agent(run: Run, tmp_path: Path, given: str, score: float | None, invalid: str) -> None:
    file = tmp_path / "function.py"
    file.write_text(FUNCTION.replace("GIVEN", given))
    trajectory = run("", function=f"{file}:agent")
    assert trajectory.score == score
    assert invalid in trajectory.invalid
    assert bool(invalid) == bool(trajectory.invalid)
    assert trajectory.metrics["turns"] == 1


def test_programs_and_functions_that_do_not_exist_are_named_at_the_start(run: Run) -> None:
    with pytest.raises(ConfigError, match="there is no program 'no-such-agent'"):
        run("", command="no-such-agent --x")
    with pytest.raises(ConfigError, match=r"no-such-agent\.py does not exist"):
        run("", function="no-such-agent.py:agent")


def test_the_clients_of_anthropic_find_the_gateway_by_their_variables(run: Run, tmp_path: Path) -> None:
    trajectory = run("""
from anthropic import Anthropic
question = {"model": os.environ["RLCORE_MODEL"], "max_tokens": 9, "messages": sample["messages"]}
with Anthropic().messages.stream(**question) as events:
    result(score=float("".join(events.text_stream) == "5"))
""")
    assert (trajectory.score, trajectory.invalid) == (1.0, "")


PAGE = Path(__file__).parents[3] / "docs" / "train-your-agent.md"


def printed(name: str) -> str:
    """The file ``name`` as the documentation prints it."""
    found = re.search(rf"^```\w+\n(# {re.escape(name)}\n.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


CURL = f"""#!{sys.executable}
# Used where curl is not installed: curl -sf URL -H HEADER -d BODY
import sys, urllib.request
url, header, body = sys.argv[2], sys.argv[4], sys.argv[6].encode()
headers = dict([header.split(": ")])
print(urllib.request.urlopen(urllib.request.Request(url, body, headers)).read().decode())
"""


@pytest.fixture
def curl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a program `curl`."""
    if shutil.which("curl") is None:
        (tmp_path / "curl").write_text(CURL)
        (tmp_path / "curl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("curl")
@pytest.mark.parametrize("name", ["my_agent.py", "my_agent.sh", "my_function.py"])
def test_agents_of_the_documentation_run(run: Run, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(printed(name))
    program = {".py": sys.executable, ".sh": "sh"}[file.suffix]
    options = {"function": f"{file}:agent"} if name == "my_function.py" else {"command": f"{program} {file}"}
    assert run("", **options).score == 1.0


def test_a_recipe_trains_a_program(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_agent.py").write_text(ASK + """
first = ask(sample["messages"])
answer = ask([*sample["messages"], {"role": "assistant", "content": first}, {"role": "user", "content": "again"}])
result(score=sum(letter.islower() for letter in answer) / 8, info={"letters": len(answer)})
""")  # fmt: skip
    prompts = [{"prompt": [{"role": "user", "content": f"say {number}"}], "ground_truth": "x"} for number in range(4)]
    Path("train.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    keys = {
        "model.path": policy, "data.train_files": "train.jsonl", "data.train_batch_size": 2, "rollout.n": 2,
        "data.max_prompt_length": 64, "data.max_response_length": 100, "trainer.total_steps": 2,
        "trainer.trackers": "[jsonl,parquet]", "trainer.out_dir": "out",
        "rollout.environment.command": f"{sys.executable} my_agent.py", "rollout.environment.turn_tokens": 8,
    }  # fmt: skip
    arguments = ["run", "grpo", *(f"{key}={value}" for key, value in keys.items())]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    steps = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [step["rollout/turns"] for step in steps] == [2.0, 2.0]
    assert all(step["rollout/invalid_ratio"] == step["rollout/branches"] == 0 for step in steps)
    assert all(abs(step["actor/rollout_kl"]) < 1e-4 for step in steps)  # trained tokens are the sampled ones
