"""Which functions are understood, what they may return, and how a function that cannot be used is reported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore.errors import ConfigError
from rlcore_kit.testing.reward import RewardConformance
from rlcore_rewards.function import FunctionOptions

Build = Callable[..., Reward]


def build_from(path: str, kwargs: dict[str, Any] | None = None, **settings: Any) -> Reward:
    options = FunctionOptions(path=path, kwargs=kwargs or {})
    return plugins.get("rlcore.rewards", "function").build(options, RewardSettings(workers=1, **settings))


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Build rewards from source code that defines ``f``, and close them at the end."""
    built: list[Reward] = []

    def from_source(source: str, kwargs: dict[str, Any] | None = None) -> Reward:
        file = tmp_path / f"reward{len(built)}.py"
        file.write_text(source)
        built.append(build_from(f"{file}:f", kwargs))
        return built[-1]

    yield from_source
    for reward in built:
        reward.close()


SAMPLE = RewardSample(
    prompt=[{"role": "user", "content": "6 * 7?"}],
    completion="it is 42",
    ground_truth={"answer": 42},
    data_source="sums",
    extra={"level": 3, "extra_info": {"split": "test"}},
    finish_reason="length",
)


class TestFunctionConformance(RewardConformance):
    path: str

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def file(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        file = tmp_path_factory.mktemp("function") / "same.py"
        file.write_text("def compute_score(solution_str, ground_truth): return solution_str == ground_truth\n")
        cls.path = f"{file}:compute_score"

    def make(self) -> Reward:
        return build_from(self.path)

    def cases(self) -> list[tuple[RewardSample, float]]:
        return [(RewardSample([], "a", "a"), 1.0), (RewardSample([], "a", "b"), 0.0)]


def test_passes_the_customary_keywords(build: Build) -> None:
    reward = build(
        "def f(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert (data_source, solution_str, ground_truth) == ('sums', 'it is 42', {'answer': 42})\n"
        "    assert extra_info == {'level': 3, 'split': 'test'}, extra_info\n"
        "    return 0.5"
    )
    assert reward.score_batch([SAMPLE]) == [RewardResult(0.5)]


@pytest.mark.parametrize(
    "source",
    [
        "def f(solution_str): return len(solution_str)",
        "def f(solution_str, bonus=0): return len(solution_str) + bonus",
        "def f(solution_str, **others): return len(solution_str) + len(others) - 3",
        "def f(sample): return len(sample.completion)",
        "def f(sample, /, bonus=0): return len(sample.completion) + bonus",
        "f = lambda s: len(s.completion)",
        "async def f(solution_str): return len(solution_str)",
        "import asyncio\nasync def f(sample):\n    await asyncio.sleep(0.001)\n    return len(sample.completion)",
        "class F:\n    def __call__(self, sample): return len(sample.completion)\nf = F()",
        "from functools import partial\ndef g(by, solution_str): return by * len(solution_str)\nf = partial(g, 1)",
        "from functools import partial\ndef g(solution_str, by): return by * len(solution_str)\nf = partial(g, by=1)",
        "from functools import partial\n"
        "def g(solution_str, ground_truth): return len(solution_str) * ground_truth\nf = partial(g, ground_truth=1)",
        "from neighbour import f",
    ],
)
def test_understands_many_kinds_of_functions(build: Build, tmp_path: Path, source: str) -> None:
    (tmp_path / "neighbour.py").write_text("def f(solution_str): return len(solution_str)")
    assert build(source).score_batch([SAMPLE, SAMPLE]) == [RewardResult(8.0)] * 2


def test_async_functions_share_one_event_loop(build: Build) -> None:
    reward = build(
        "import asyncio\nseen = set()\n"
        "async def f(sample):\n    seen.add(id(asyncio.get_running_loop()))\n    return len(seen)"
    )
    assert [result.score for result in reward.score_batch([SAMPLE] * 3)] == [1.0] * 3


def test_passes_kwargs(build: Build) -> None:
    reward = build("def f(solution_str, scale, *, names): return scale * len(names)", {"scale": 2, "names": ["a", "b"]})
    assert reward.score_batch([SAMPLE]) == [RewardResult(4.0)]


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("1", RewardResult(1.0)),
        ("True", RewardResult(1.0)),
        ("-0.25", RewardResult(-0.25)),
        ("__import__('fractions').Fraction(1, 4)", RewardResult(0.25)),
        ("__import__('numpy').float32(0.5)", RewardResult(0.5)),
        ("__import__('numpy').array(3)", RewardResult(3.0)),
        ("{'score': 1}", RewardResult(1.0)),
        (
            "{'score': 0.5, 'acc': True, 'pred': '42', 'note': [], 'nan': float('nan')}",
            RewardResult(0.5, {"acc": 1.0}, "42"),
        ),
        ("RewardResult(0.5, {'length': 3}, answer='x')", RewardResult(0.5, {"length": 3.0}, "x")),
    ],
)
def test_accepts_many_kinds_of_results(build: Build, value: str, result: RewardResult) -> None:
    reward = build(f"from rlcore.engines.reward import RewardResult\ndef f(sample): return {value}")
    assert reward.score_batch([SAMPLE]) == [result]


@pytest.mark.parametrize(
    "value",
    [
        *(
            "None",
            "'1'",
            "b'1'",
            "[1]",
            "1j",
            "object()",
            "lambda: 1",
            "float('nan')",
            "-float('inf')",
            "10**400",
            "1e39",
        ),
        *("{}", "{'score': None}", "{'score': {'score': 1}}", "RewardResult(float('nan'))"),
        *("{'score': 1, 'answer': 'x' * 2_000_000}", "RewardResult(1, {'a': 'b'})"),
        *("{'score': 1, 'error_ratio': 0.5}", "{'score': 1, '': 2}", "RewardResult(1, {'a\\nb': 2})"),
        "{'score': 1, **{str(i): i for i in range(2000)}}",
    ],
)
def test_refuses_other_results(build: Build, value: str, caplog: pytest.LogCaptureFixture) -> None:
    reward = build(f"from rlcore.engines.reward import RewardResult\ndef f(sample): return {value}")
    assert reward.score_batch([SAMPLE]) == [RewardResult(0.0, error="result")]
    assert "returned" in caplog.text


def test_finds_functions_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "length.py").write_text(
        "class Scores:\n    @staticmethod\n    def f(solution_str): return len(solution_str)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = build_from("my_rewards.length:Scores.f")
    assert reward.score_batch([SAMPLE]) == [RewardResult(8.0)]
    reward.close()
    assert "my_rewards" not in sys.modules


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("", "missing.py:f", r"file .*missing\.py does not exist"),
        ("", "s3://bucket/reward.py:f", "must be in a file on this machine, not at a URL$"),
        ("", "{file}/../folder.py:f", r"folder\.py is not a regular file$"),
        ("", "no_such_package.module:f", "there is no module 'no_such_package'"),
        ("", "json.nothing:f", "there is no module 'json.nothing'"),
        ("def g(sample): ...", "{file}:f", "has no 'f'; it has g"),
        ("f = 3", "{file}:f", "'f' in .* is a int, not a function"),
        ("def f(): ...", "{file}:f", r"one RewardSample, but f\(\) cannot be called in this way"),
        ("def f(completion, truth): ...", "{file}:f", "missing a required argument: 'truth'"),
        ("def f(solution_str, scale): ...", "{file}:f", "missing a required argument: 'scale'"),
        (
            "from functools import partial\nf = partial(lambda: 1)",
            "{file}:f",
            r"but <lambda>\(\) cannot be called in this way",
        ),
        ("class F:\n    def __call__(self): ...\nf = F()", "{file}:f", r"but F\(\) cannot be called in this way"),
        ("def f(queries, prompts, labels): ...", "{file}:f", "name its arguments as TRL does: completions for the"),
        ("def f(solution_str", "{file}:f", r"importing it fails with SyntaxError: .* \(reward.py, line 1\)$"),
        ("import nothing_like_this", "{file}:f", "ModuleNotFoundError.*reward.py, line 1"),
        ("x = 1\n1 / 0", "{file}:f", "ZeroDivisionError.*reward.py, line 2"),
        ("import sys\nsys.exit(1)", "{file}:f", "importing it fails with SystemExit"),
        ("import os\nos._exit(5)", "{file}:f", "ended with code 5"),
        ("while True: pass", "{file}:f", "startup_timeout_s=1"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_clear_error(
    tmp_path: Path, source: str, path: str, message: str
) -> None:
    file = tmp_path / "reward.py"
    file.write_text(source)
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match=message) as caught:
        build_from(path.format(file=file), startup_timeout_s=1)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("reward function '")


def test_kwargs_that_the_function_does_not_take_are_an_error(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"with kwargs \['scale'\]: got an unexpected keyword argument 'scale'"):
        build("def f(solution_str): return 1", {"scale": 2})


@pytest.mark.parametrize("path", ["f", "file.py", ":f", "file.py:", "a b:f", "file.py:f()"])
def test_a_malformed_path_is_refused_when_it_is_read(path: str) -> None:
    with pytest.raises(ValidationError, match=r"neither 'file.py:function' nor 'package.module:function'"):
        FunctionOptions(path=path)


def test_listing_and_checking_rewards_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom rlcore import plugins\n"
        "for name in ('gsm8k', 'math', 'function', 'combine'):\n"
        "    plugins.get('rlcore.rewards', name).config_class()\n"
        "print({'torch', 'math_verify', 'sympy', 'numpy', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
