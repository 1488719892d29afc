"""Tokens are shifted against hidden states in `rlcore.batch.alignment` and nowhere else, found by reading the sources.

A shift by one token is easily written a second time, and a wrong one trains a model on the wrong tokens without an
error. Every form that a shift takes is an error here: `[:-1]` and `[1:]`, `roll`, `narrow`, `pad`, an index plus or
minus one. Where the form has another meaning, ``# shift allowed: reason`` says so at the end of the line, or above it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
SHIFT = "core/src/rlcore/batch/alignment.py"
ALLOWED = re.compile(r"# shift allowed: \S")
ADVICE = (
    "shifts by one element. Tokens and hidden states are shifted in rlcore.batch.alignment only (token_positions, "
    "state_positions, next_entries, last_entries): use it, or say on the line what else this is (# shift allowed: …)"
)

TENSOR_LIBRARIES = {"torch", "numpy", "transformers", "megatron"}
TOKENS = re.compile(r"token|logit|log_?prob|label|target|hidden|input_ids|\bids\b|mask|prompt|completion|response")
POSITIONS = re.compile(r"(position|state|label|target|column|place|indice)s\b")
INDEXING = {"index_select", "gather", "take", "take_along_dim", "scatter", "index_copy", "index_put"}


def shifts(source: str) -> list[tuple[int, str]]:
    """Return the line and text of everything in ``source`` that may shift tokens."""
    tree = ast.parse(source)
    tensors = any(name in TENSOR_LIBRARIES for name in _imported(tree))
    allowed = {line for lines in _permissions(source).values() for line in lines}
    found = {
        (node.lineno, ast.unparse(node), frozenset(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
        for node in ast.walk(tree)
        if isinstance(node, ast.expr) and _may_shift(node, tensors)
    }
    return sorted((line, text) for line, text, span in found if not span & allowed)


def needless_permissions(source: str) -> list[int]:
    """Return the lines of comments that allow a shift where there is none."""
    shifted = {line for line, _ in shifts(ALLOWED.sub("# ", source))}
    return [number for number, lines in _permissions(source).items() if not shifted & set(lines)]


def _permissions(source: str) -> dict[int, tuple[int, ...]]:
    """Return the lines that each comment allows to shift: its own and, if it is alone there, the one below."""
    return {
        number: (number, number + 1) if line.lstrip().startswith("#") else (number,)
        for number, line in enumerate(source.splitlines(), 1)
        if ALLOWED.search(line)
    }


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def _may_shift(node: ast.expr, tensors: bool) -> bool:
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        of = ast.unparse(node.value)
        if any(map(_drops_one, parts)):
            shape = of.endswith(("shape", ".size()")) or of in ("args", "argv", "sys.argv", "arguments")
            return not shape and (tensors or bool(TOKENS.search(of)))
        return tensors and any(_moves_by_one(part) for part in parts)
    if not tensors:
        return False
    if isinstance(node, ast.BinOp):
        return _moves_by_one(node) and bool(POSITIONS.search(ast.unparse(node.left)))
    if isinstance(node, ast.Call):
        return _call_may_shift(node)
    return False


def _call_may_shift(node: ast.Call) -> bool:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    if called == "roll":
        return True
    if called == "narrow":
        return any(_constant(value) == 1 or _moves_by_one(value) for value in values[1:])
    if called == "pad":
        return any(
            {_constant(item) for item in value.elts} >= {1, -1} for value in values if isinstance(value, ast.Tuple)
        )
    return called in INDEXING and any(map(_moves_by_one, values))


def _drops_one(part: ast.expr) -> bool:
    """``:-1``, ``1:`` or ``: n - 1``."""
    if not isinstance(part, ast.Slice) or part.step is not None:
        return False
    first, last = part.lower is None or _constant(part.lower) == 0, part.upper
    ends_early = last is not None and (_constant(last) == -1 or (isinstance(last, ast.BinOp) and _minus_one(last)))
    return (first and ends_early) or (
        _constant(part.lower) == 1 and (last is None or not isinstance(last, ast.Constant))
    )


def _moves_by_one(value: ast.expr) -> bool:
    return isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add | ast.Sub) and _constant(value.right) == 1


def _minus_one(value: ast.BinOp) -> bool:
    return isinstance(value.op, ast.Sub) and _constant(value.right) == 1


def _constant(value: ast.expr | None) -> object:
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def modules() -> list[Path]:
    return sorted(file for file in PACKAGES.glob("*/src/**/*.py") if str(file.relative_to(PACKAGES)) != SHIFT)


def test_no_module_but_the_alignment_shifts_tokens() -> None:
    found = [
        f"{file.relative_to(PACKAGES)}:{line}: {text}" for file in modules() for line, text in shifts(file.read_text())
    ]
    assert not found, f"this {ADVICE}:\n" + "\n".join(found)


def test_every_permission_is_needed() -> None:
    needless = [
        f"{file.relative_to(PACKAGES)}:{line}" for file in modules() for line in needless_permissions(file.read_text())
    ]
    assert not needless, "nothing on these lines looks like a shift; remove the comment: " + ", ".join(needless)


@pytest.mark.parametrize(
    "line",
    [
        "logits[:, :-1]",
        "logits[0, :-1].float()",
        "tokens[1:, None]",
        "x[..., :-1, :]",
        "hidden[: len(hidden) - 1]",
        "logprobs[1:length]",
        "torch.roll(labels, -1)",
        "labels.roll(shifts=-1, dims=1)",
        "hidden.narrow(0, 1, n)",
        "hidden.narrow(0, 0, n - 1)",
        "F.pad(labels, (-1, 1))",
        "hidden[positions - 1]",
        "hidden.index_select(0, x - 1)",
        "logits.gather(0, x + 1)",
        "states = place[columns] - 1",
        "states = positions - 1",
    ],
)
def test_every_form_of_a_shift_is_found(line: str) -> None:
    assert shifts(f"import torch\n{line}\n")[0][0] == 2
    assert shifts(f"import torch\n{line}  # shift allowed: an example\n") == []
    assert shifts(f"import torch\n# shift allowed: an example\n{line}\n") == []
    assert shifts(f"import torch\nx = 1  # shift allowed: an example\n{line}\n")
    assert shifts(f"import torch\n{line}  # shift allowed:\n"), "a permission needs a reason"


@pytest.mark.parametrize("line", ["tokens[:-1]", "ids[1:]", "loss_mask[:-1]", "row.logprobs[1:]"])
def test_a_shift_of_python_lists_is_found_without_torch(line: str) -> None:
    assert shifts(f"{line}\n")


@pytest.mark.parametrize(
    "line", ["x.shape[1:]", "x.size()[:-1]", "args[1:]", "x[1:3]", "x[:-2]", "count + 1", "x[0]", "x[:n]", "size - 1"]
)
def test_other_slices_are_allowed(line: str) -> None:
    assert shifts(f"import torch\n{line}\n") == []


def test_slices_of_paths_and_texts_are_allowed_where_there_are_no_tensors() -> None:
    assert shifts("path[:-1]\nkeys[1:]\nmessages[:-1]\n") == []


def test_a_permission_without_a_shift_is_found() -> None:
    assert needless_permissions("import torch\nx = 1  # shift allowed: an example\n") == [2]
    assert needless_permissions("import torch\nx[1:]  # shift allowed: an example\n") == []
