"""Whatever a library raises becomes one sentence."""

import pytest

from rlcore.boundary import LONGEST_REASON, boundary
from rlcore.errors import DataError, EngineError, WorkerDied


class Panic(BaseException):
    """As pyo3's, which is no `Exception`."""


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (
            RecursionError("maximum recursion depth exceeded"),
            "a.json: RecursionError: maximum recursion depth exceeded",
        ),
        (AssertionError(), "a.json: AssertionError"),
        (OSError(36, "File name too long"), r"a.json: OSError: \[Errno 36\] File name too long"),
        (Panic("first line\n  the cause\n\n"), "a.json: Panic: the cause"),
        (ValueError("odd \ud800"), r"a.json: ValueError: odd \\ud800"),
        (ValueError("x" * 10_000), f"a.json: ValueError: x{{{LONGEST_REASON}}} …"),
    ],
)
def test_any_exception_becomes_one_sentence(raised: BaseException, sentence: str) -> None:
    with pytest.raises(EngineError, match=f"^{sentence}$") as caught, boundary("a.json", EngineError):
        raise raised
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [DataError("ours"), WorkerDied("gone"), KeyboardInterrupt(), SystemExit(3)])
def test_errors_of_ours_and_requests_to_stop_pass(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, boundary("a.json", EngineError):
        raise raised
    assert caught.value is raised
