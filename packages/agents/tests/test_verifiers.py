"""Environments of verifiers: real task sets, agents and train client against scripted and tiny policies."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from rlcore.cli.command_tree import cli
from rlcore.engines import ModelSettings, RolloutEngine
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec, PromptSample, Trajectory
from rlcore.engines.rollout import Completion, GenerationRequest, SamplingParams
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import ConfigError, DataError, EngineError, PluginError
from rlcore_agents.verifiers import environment
from rlcore_agents.verifiers.runner import VerifiersRunner, build
from rlcore_agents.verifiers.settings import VerifiersData, VerifiersSettings
from rlcore_agents.verifiers.tasks import verifiers
from rlcore_kit.testing.tiny_model import tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=8, max_tokens=2000, max_model_len=4000, timeout_s=300)
LOCAL = {"taskset": {"id": "vf_sums"}}
Play = Callable[..., tuple[Trajectory, "Script"]]


class Script(RolloutEngine):
    """Answers prompts with given texts, in order; its log-probs and versions tell tokens apart."""

    def __init__(self, tokenizer: Any, texts: Iterable[str]) -> None:
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.end = tokenizer and tokenizer.eos_token_id
        self.requests: list[GenerationRequest] = []
        self.completions: list[Completion] = []

    async def generate(self, request: GenerationRequest) -> Completion:
        if not self.texts:
            raise RuntimeError("the script is over")
        tokens = [*self.tokenizer.encode(self.texts.pop(0), add_special_tokens=False), self.end]
        tokens = tokens[: request.sampling.max_tokens]
        number = len(self.completions)
        completion = Completion(
            tokens,
            [-(number + 1) - index / 1000 for index in range(len(tokens))],
            "stop",
            [(number, 1), (number + 1, len(tokens) - 1)] if len(tokens) > 1 else [(number, len(tokens))],
        )
        self.requests.append(request)
        self.completions.append(completion)
        return completion

    @property
    def version(self) -> int:
        return 0

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        raise NotImplementedError

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        pass

    pause = resume = sleep = wake = close = lambda self: None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer of bytes with the special tokens of Qwen3."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = tiny_tokenizer()
    specials = ["im_start|", "im_end|", "endoftext|"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}>" for name in specials]})
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tags = [f"{start}{name}>" for name in ("think", "tool_call", "tool_response") for start in ("<", "</")]
    tokenizer.add_tokens(tags)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _task_sets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = str(Path(__file__).parent / "verifiers_tasks")
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", folder)  # of the servers of tools
        yield


def spec_of(folder: Path, env: dict[str, Any], **changes: Any) -> EpisodeSpec:
    options = VerifiersSettings(env=env, renderer="qwen3")
    spec = EpisodeSpec(ModelSettings(path=str(folder)), options, SamplingParams(max_tokens=500), LIMITS)
    return replace(spec, **changes)


def samples_of(taskset: str = "vf_sums", **options: Any) -> list[PromptSample]:
    rows = verifiers(VerifiersData(taskset=taskset, config=options, n=2))["train"]
    return [PromptSample([7, 7], row["prompt"], extra=row["extra_info"], index=index) for index, row in enumerate(rows)]


@pytest.fixture
def play(qwen: Path) -> Iterator[Play]:
    """Plays one episode of an environment with a script."""
    runners: list[VerifiersRunner] = []

    def play(env: dict[str, Any], texts: Iterable[str], *, mode: str = "single", **changes: Any):
        spec = spec_of(qwen, env, **changes)
        runner = build(spec)
        runners.append(runner)
        script = Script(AutoTokenizer.from_pretrained(spec.model.path), texts)
        return asyncio.run(runner.run(script, samples_of(mode=mode)[0], 5)), script

    yield play
    for runner in runners:
        runner.close()


def paths(trajectory: Trajectory) -> list[list[int]]:
    """Tokens of every row."""
    return [[token for index in row for token in trajectory.segments[index].tokens] for row in trajectory.rows()]


def check_exact(trajectory: Trajectory, script: Script) -> None:
    """Every completion is a segment with its tokens, log-probs and versions, after exactly its prompt."""
    found = {}
    for row in trajectory.rows():
        tokens: tuple[int, ...] = ()
        for segment in (trajectory.segments[index] for index in row):
            if segment.sampled:
                found[tokens] = (list(segment.tokens), list(segment.logprobs or ()), list(segment.versions))
            tokens += tuple(segment.tokens)
    assert len(found) == sum(segment.sampled for segment in trajectory.segments)
    assert found == {
        tuple(request.prompt): (made.tokens, made.logprobs, made.versions)
        for request, made in zip(script.requests, script.completions, strict=True)
    }


def test_a_task_of_one_turn_is_a_prompt_and_a_completion_scored_by_the_task(play: Play) -> None:
    trajectory, script = play(LOCAL, ["it is 1"])
    check_exact(trajectory, script)
    assert len(trajectory.rows()) == 1
    assert (trajectory.score, trajectory.invalid, trajectory.finish_reason) == (2.0, "", "stop")
    assert [message["role"] for message in trajectory.messages] == ["system", "user", "assistant"]
    assert trajectory.metrics["length"] == 7
    assert trajectory.metrics["reward/correct"] == 2
    text = script.tokenizer.decode(script.requests[0].prompt)
    assert text == "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n0+1<|im_end|>\n<|im_start|>assistant\n"


def test_turns_with_tools_continue_the_sampled_tokens(play: Play) -> None:
    # JSON with spaces that no template would write again
    call = '<tool_call>\n{"name":  "add", "arguments": {"a": 3,   "b": 5}}\n</tool_call>'
    trajectory, script = play(LOCAL, ["sum: " + call, call, "8 and 1"], mode="tools")
    check_exact(trajectory, script)
    assert len(trajectory.rows()) == 1
    assert [segment.sampled for segment in trajectory.segments if segment.tokens].count(True) == 3
    assert trajectory.score == 2.0
    roles = [message["role"] for message in trajectory.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert trajectory.messages[2]["tool_calls"][0]["function"]["name"] == "add"
    # between two completions stand the tool's answer and the template's glue, none of it sampled
    decoded = script.tokenizer.decode(paths(trajectory)[0])
    assert decoded.count("8 \U0001f600") == 2


def test_a_history_that_is_rewritten_makes_a_branch(play: Play) -> None:
    trajectory, script = play(LOCAL, ["perhaps 3", "1"], mode="forget")
    check_exact(trajectory, script)
    assert len(trajectory.rows()) == 2
    assert trajectory.segments[0].tokens  # the system message, which both share
    assert trajectory.rows()[0][0] == trajectory.rows()[1][0] == 0


def test_the_agent_that_is_not_trained_gives_no_rows(play: Play) -> None:
    critic = {"harness": {"id": "vf_sums"}, "sampling": {"temperature": 0.2}}
    trajectory, script = play({**LOCAL, "id": "vf_debate", "solver": {}, "critic": critic}, ["2", "really?", "no, 1"])
    assert [request.sampling.temperature for request in script.requests] == [1.0, 0.2, 1.0]
    assert len(trajectory.rows()) == 1
    own = [list(segment.tokens) for segment in trajectory.segments if segment.sampled]
    assert own == [script.completions[0].tokens, script.completions[2].tokens]
    assert "really?" in script.tokenizer.decode(paths(trajectory)[0])
    assert trajectory.score == 2.0


def test_agents_that_are_trained_together_get_their_own_rewards(play: Play) -> None:
    env = {**LOCAL, "id": "vf_debate", "train_critic": True, "critic": {"harness": {"id": "vf_sums"}}}
    trajectory, script = play(env, ["2", "really?", "no, 1"])
    rewards = {tuple(s.tokens): s.reward for s in trajectory.segments if s.sampled}
    first, critic, last = (tuple(made.tokens) for made in script.completions)
    assert rewards == {first: None, critic: -1.0, last: 2.0}
    assert trajectory.score == 0.0
    assert len(trajectory.rows()) == 2
    assert {message["agent"] for message in trajectory.messages} == {"solver", "critic"}


def test_attempts_of_an_agent_are_compared_within_an_episode(play: Play) -> None:
    trajectory, script = play({**LOCAL, "id": "best-of-n", "n": 2}, ["1", "2"])
    rewards = [(list(segment.tokens), segment.reward) for segment in trajectory.segments if segment.sampled]
    assert rewards == [(script.completions[0].tokens, 2.0), (script.completions[1].tokens, 0.0)]
    assert len(trajectory.rows()) == 2
    assert trajectory.metrics["reward/correct"] == 1.0
    seeds = [request.sampling.seed for request in script.requests]
    assert seeds[0] != seeds[1]  # of the same prompt


def test_a_task_that_raises_is_invalid_and_says_why(play: Play) -> None:
    trajectory, _ = play(LOCAL, ["1"], mode="raise")
    assert trajectory.invalid == (
        "agent 'agent' of vf_sums failed in task 0: TaskError: task setup: ValueError: the data base of sums is gone"
    )
    assert trajectory.score is None
    assert paths(trajectory) == [[7, 7]]


def test_an_engine_that_fails_is_no_fault_of_the_episode(play: Play) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match="the script is over"):
        play(LOCAL, [], mode="stubborn")
    assert time.monotonic() - started < 100  # the program, which waits to ask again, is not waited for


def test_the_bash_harness_runs_commands_in_a_subprocess_and_calls_servers_of_tools(play: Play) -> None:
    command = '{"name": "bash", "arguments": {"command": "echo $((40 + 2)) > n; cat n; pwd"}}'
    calls = [command, '{"name": "add", "arguments": {"a": 30, "b": 4}}']
    env = {
        "taskset": {"id": "vf_sums", "task": {"server": True}},
        "agent": {"harness": {"id": "bash"}, "runtime": {"type": "subprocess"}},
    }
    said = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    trajectory, script = play(env, [*said, "it is 1"])
    assert trajectory.invalid == ""
    check_exact(trajectory, script)
    answers = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    assert answers[0].split()[0] == "42"
    assert not Path(answers[0].split()[1]).exists()  # the working folder is gone
    assert "34" in answers[1]
    assert trajectory.score == 2.0


def test_episodes_run_together_and_their_calls_stay_apart(qwen: Path) -> None:
    class Echo(Script):
        async def generate(self, request: GenerationRequest) -> Completion:
            asked = self.tokenizer.decode(request.prompt).split("user\n")[1].split("+")[0]
            self.texts.append(asked)
            await asyncio.sleep(0.01)
            self.texts[:] = [asked]
            return await super().generate(request)

    runner = build(spec_of(qwen, LOCAL))
    script = Echo(AutoTokenizer.from_pretrained(qwen), [])
    samples = samples_of(mode="single")

    async def both() -> list[Trajectory]:
        return await asyncio.gather(*(runner.run(script, samples[number % 2], number) for number in range(6)))

    trajectories = asyncio.run(both())
    asyncio.run(runner.run(script, samples[0], 9))  # another event loop
    runner.close()
    assert [trajectory.messages[-1]["content"] for trajectory in trajectories] == ["0", "1"] * 3
    seeds = [request.sampling.seed for request in script.requests]
    assert len(set(seeds)) == 7


def test_a_cancelled_episode_leaves_no_process(qwen: Path, tmp_path: Path) -> None:
    env = {**LOCAL, "agent": {"harness": {"id": "bash"}, "runtime": {"type": "subprocess"}}}
    command = {"command": f"echo $$ > {tmp_path}/pid; exec sleep 300"}
    call = json.dumps({"name": "bash", "arguments": command})
    runner = build(spec_of(qwen, env))
    script = Script(AutoTokenizer.from_pretrained(qwen), [f"<tool_call>\n{call}\n</tool_call>"])

    async def cancel() -> None:
        episode = asyncio.ensure_future(runner.run(script, samples_of()[0], 0))
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")):
            assert not episode.done(), episode.result()
            await asyncio.sleep(0.05)
        episode.cancel()
        await asyncio.wait([episode])

    asyncio.run(cancel())
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    runner.close()


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("template", ["qwen2.5", "llama3"])
def test_models_without_a_renderer_continue_their_tokens_by_their_chat_template(
    template: str, tmp_path: Path, play: Play
) -> None:
    model = tmp_path / "model"
    tokenizer = tiny_tokenizer()
    ends = {"qwen2.5": "<|im_end|>", "llama3": "<|eot_id|>"}
    tokenizer.add_special_tokens({"eos_token": ends[template]})
    tokenizer.chat_template = (Path(__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    tokenizer.save_pretrained(model)
    calls = {"llama3": '{"name": "add",  "parameters": {"a": 3,   "b": 5}}'}
    call = calls.get(template, '<tool_call>\n{"name":  "add", "arguments": {"a": 3,   "b": 5}}\n</tool_call>')
    options = VerifiersSettings(env=LOCAL)
    trajectory, script = play(
        LOCAL,
        [call, "8 and 1"],
        mode="tools",
        model=ModelSettings(path=str(model)),
        options=options,
        end_tokens=frozenset({tokenizer.eos_token_id}),
    )
    check_exact(trajectory, script)
    assert trajectory.invalid == ""
    assert len(trajectory.rows()) == 1
    assert [message["role"] for message in trajectory.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_seeds_derive_from_that_of_the_episode(play: Play) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    (first, again) = ([r.sampling.seed for r in play(LOCAL, [call, "1"], mode="tools")[1].requests] for _ in range(2))
    assert first == again
    assert len(set(first)) == 2


def test_sampling_is_that_of_the_run(play: Play) -> None:
    sampling = SamplingParams(max_tokens=9, temperature=0.5, top_k=3, top_p=0.9, stop=("x",), stop_token_ids=(65,))
    _, script = play(LOCAL, ["1"], sampling=sampling)
    got = script.requests[0].sampling
    assert set(got.stop_token_ids) >= {65, script.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert replace(got, seed=None, stop_token_ids=(65,)) == sampling


def test_an_agent_with_another_temperature_than_the_run_cannot_be_trained(play: Play) -> None:
    with pytest.raises(ConfigError, match=r"env\.agent\.sampling\.temperature is 0\.1, .*set rollout\.temperature"):
        play({**LOCAL, "agent": {"sampling": {"temperature": 0.1}}}, ["1"])


def test_limits_end_an_episode_whose_tokens_count(play: Play) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    trajectory, script = play(LOCAL, [call] * 9, mode="tools", limits=replace(LIMITS, max_turns=2))
    check_exact(trajectory, script)
    assert trajectory.invalid == ""
    assert trajectory.info["stop_condition"] == "max_turns"
    assert len(script.completions) == 2

    trajectory, script = play(LOCAL, ["1" * 50], limits=replace(LIMITS, max_tokens=10))
    check_exact(trajectory, script)
    assert len(script.completions[0].tokens) == 10

    trajectory, script = play(LOCAL, [call] * 9, mode="tools", limits=replace(LIMITS, max_tokens=50))
    check_exact(trajectory, script)
    assert (trajectory.invalid, trajectory.score) == ("", 0.0)
    assert trajectory.info["stop_condition"] == "max_total_tokens"
    assert len(script.completions) == 1


def test_an_episode_that_takes_too_long_is_invalid(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: Script, request: GenerationRequest) -> Completion:
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(Script, "generate", never)
    trajectory, _ = play(LOCAL, [], limits=replace(LIMITS, timeout_s=0.5))
    assert "exceeded its 0.5s deadline" in trajectory.invalid


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"taskset": {"id": "nope"}}, r"taskset 'nope' not found .* Installed task sets: harbor, nemo_gym, "),
        ({**LOCAL, "id": "nope"}, "environment 'nope' not found"),
        ({**LOCAL, "agent": {"harness": {"id": "nope"}}}, "harness 'nope' not found .* The built-in harnesses are: "),
        ({"taskset": {"id": "vf_sums", "sise": 3}}, "env: taskset.sise: unknown key"),
        ({**LOCAL, "solver": {}, "agent": {"max_turns": "x"}}, "agent.max_turns: .*; solver: unknown key"),
        (
            {**LOCAL, "agent": {"harness": {"id": "bash"}}},
            "env.agent.runtime.type is not set, and the harness 'bash' runs commands that the model writes: choose",
        ),
    ],
)
def test_a_mistake_in_the_configuration_is_one_sentence(qwen: Path, env: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as raised:
        build(spec_of(qwen, env))
    assert "\n" not in str(raised.value)


def test_the_harness_null_is_null_although_yaml_reads_it_as_nothing() -> None:
    loaded = environment.load_environment({**LOCAL, "agent": {"harness": {"id": None}}}, LIMITS)
    assert loaded.config.agent.harness.id == "null"
    assert loaded.config.agent.runtime.type == "subprocess"


def test_a_missing_package_is_named(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(environment.PACKAGE, module="verifiers_of_another_world")
    monkeypatch.setattr(environment, "PACKAGE", missing)
    with pytest.raises(PluginError, match=r"needs the package .* pip install 'rlcore\[verifiers\]'"):
        build(spec_of(qwen, LOCAL))


def test_data_rows_name_their_task(qwen: Path) -> None:
    splits = verifiers(VerifiersData(taskset="vf_sums", n=2, test=1, config={"size": 9}, shuffle=True))
    assert [len(rows) for rows in splits.values()] == [2, 1]
    row = splits["train"][0]
    assert row["prompt"][0] == {"role": "system", "content": "Add."}
    stored = json.loads(row["extra_info"]["verifiers_task"])
    assert stored["data"]["answer"] == stored["data"]["idx"] + 1
    with pytest.raises(DataError, match="has only 4 tasks, and test=4 are asked for"):
        verifiers(VerifiersData(taskset="vf_sums", test=4))


def test_a_sample_of_other_data_is_refused(qwen: Path) -> None:
    runner = build(spec_of(qwen, LOCAL))
    with pytest.raises(DataError, match=r"sample 3 .* no verifiers_task; make its file with: rlcore data verifiers"):
        asyncio.run(runner.run(Script(None, []), PromptSample([1], [], index=3), 0))
    other = json.dumps({"taskset": "gsm8k", "data": {}})
    with pytest.raises(DataError, match=r"a task of 'gsm8k', but env\.taskset\.id is 'vf_sums'"):
        asyncio.run(runner.run(Script(None, []), PromptSample([1], [], extra={"verifiers_task": other}), 0))
    runner.close()


def test_a_run_trains_on_episodes_of_verifiers(policy: Path, tmp_path: Path) -> None:
    command = ["data", "verifiers", "--taskset", "vf_sums", "--n", "2", "--config", "size=9", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert "train.parquet: 2 rows" in done.output
    keys = {
        "model.path": policy,
        "data.train_files": tmp_path / "train.parquet",
        "data.train_batch_size": 2,
        "data.max_prompt_length": 200,
        "data.max_response_length": 300,
        "rollout.n": 2,
        "rollout.environment": "verifiers",
        "rollout.environment.verifiers.env.taskset.id": "vf_sums",
        "rollout.environment.verifiers.env.id": "vf_debate",
        "rollout.environment.verifiers.env.train_critic": "true",
        "rollout.environment.verifiers.env.critic.harness.id": "vf_sums",
        "rollout.environment.turn_tokens": 16,
        "algorithm.credit": "branch",
        "trainer.total_steps": 1,
        "trainer.trackers": "[jsonl]",
        "trainer.out_dir": tmp_path / "run",
    }
    words = [f"{key}={value}" for key, value in keys.items()]
    done = CliRunner().invoke(cli, ["run", "grpo", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert -1 <= metrics["critic/score/mean"] <= 1  # of both agents together
    assert (metrics["rollout/turns"], metrics["rollout/rows_per_episode"]) == (3, 2)
    assert metrics["rollout/critic/reward/objection"] == -1
    assert metrics["actor/rollout_prob_diff"] < 1e-4  # the tokens and log-probs that are trained are the engine's
