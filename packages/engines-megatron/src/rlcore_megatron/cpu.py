"""Megatron-core 0.16.1 on a machine without CUDA: for tests, and for debugging a configuration on a laptop.

Megatron asks for CUDA by name in some hundred places, most of which only want to know where tensors live. `install`
answers them inside megatron's own modules; ``torch`` itself, and what everybody else sees of it, stays as it is:

- the name ``torch`` in every megatron module becomes a stand-in whose ``cuda`` is the CPU and whose tensor factories
  take ``device="cuda"`` for it; all else comes from torch;
- functions that compare ``Tensor.type()`` with ``"torch.cuda.FloatTensor"`` or call ``Tensor.cuda()`` get these
  constants and names changed in their own code objects;
- ``jit_fuser`` (``torch.compile``) does nothing: kernels for tiny test models take longer to compile than to run;
- the random state of the CUDA device is the one of the CPU.

It cannot be undone: a process that has used Megatron on the CPU cannot use it on CUDA.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from rlcore.errors import EngineError

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
# Modules whose functions name CUDA tensors in their code.
_NAMES_CUDA_TENSORS = (
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.models.common.language_module.language_module",
)
# Megatron imports some of these only when it needs them, after `install`.
_IMPORTED = (
    *_NAMES_CUDA_TENSORS,
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer.cpu_offloading",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.multi_token_prediction",
)
_JIT = "megatron.core.jit"


def install() -> None:
    """Make megatron-core compute on the CPU in this process; idempotent.

    Raises:
        EngineError: megatron-core has been imported without this already, so that parts of it hold on to CUDA.
    """
    if installed():
        return
    if _JIT in sys.modules:
        raise EngineError(
            "megatron-core was imported in this process before the engine asked for it on the CPU; let the engine be "
            "the first to import it"
        )
    sys.modules[_JIT] = _jit_without_compiler()
    for name in _IMPORTED:
        importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and getattr(module, "torch", None) is torch:
            module.torch = _TORCH  # type: ignore[attr-defined]
    for name in _NAMES_CUDA_TENSORS:
        for function in _functions(sys.modules[name]):
            function.__code__ = _without_cuda(function.__code__)
    random: Any = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def installed() -> bool:
    """Whether megatron-core computes on the CPU in this process."""
    return getattr(sys.modules.get(_JIT), "__rlcore_cpu__", False)


def _jit_without_compiler() -> ModuleType:
    """In the place of ``megatron.core.jit``, which hands ``torch.compile`` to 41 decorators at import.

    The environment variable that turns torch's compiler off would do so for everybody in the process.
    """
    module: Any = ModuleType(_JIT)
    module.jit_fuser = module.noop_decorator = lambda function: function
    module.enable_jit_fuser = module.disable_jit_fuser = lambda: None
    module.__rlcore_cpu__ = True
    return module  # type: ignore[no-any-return]


class _Stream:
    """What waits on a stream has nothing to wait for; the device's work is done when a call returns."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Stream:
        return self


class _Cuda(ModuleType):
    """``torch.cuda`` as megatron's modules see it."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _CPU

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return False

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def Stream(self, *args: Any, **kwargs: Any) -> _Stream:
        return _Stream()

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    default_stream = current_stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _Torch(ModuleType):
    """``torch`` as megatron's modules see it."""

    def __init__(self) -> None:
        super().__init__("torch")
        # `_without_cuda` lets functions that say both `torch.cuda` and `tensor.cuda()` say `cpu` instead
        self.cuda = self.cpu = _Cuda()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


_TORCH = _Torch()


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Every function written in ``module``, in its classes too."""
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


def _without_cuda(code: CodeType) -> CodeType:
    names = tuple("cpu" if name == "cuda" else name for name in code.co_names)
    return code.replace(co_consts=tuple(map(_constant, code.co_consts)), co_names=names)


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _without_cuda(value)
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, str) and value.startswith("torch.cuda.") and value.endswith("Tensor"):
        return value.replace("torch.cuda.", "torch.")
    return value
