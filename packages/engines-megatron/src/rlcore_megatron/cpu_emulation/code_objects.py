"""Functions whose code names CUDA tensors, changed to name those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any


def functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """Yield every function that is written in ``module``, those of its classes included."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value).values() if isinstance(value, type) else (value,)
        for member in members:
            function = getattr(member, "__func__", member)  # of class and static methods
            if isinstance(function, property):
                function = function.fget
            while hasattr(function, "__wrapped__"):  # `torch.no_grad()` and the like
                function = function.__wrapped__
            if isinstance(function, FunctionType):
                yield function


def without_cuda(code: CodeType) -> CodeType:
    """Return ``code`` with ``Tensor.cpu`` for ``Tensor.cuda``, and names of CPU tensor types for CUDA ones."""
    names = tuple("cpu" if name == "cuda" else name for name in code.co_names)
    return code.replace(co_consts=tuple(map(_constant, code.co_consts)), co_names=names)


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return without_cuda(value)
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, str) and value.startswith("torch.cuda.") and value.endswith("Tensor"):
        return value.replace("torch.cuda.", "torch.")
    return value
