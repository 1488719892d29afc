"""``torch`` as megatron's modules see it on the CPU: ``torch.cuda`` and the device "cuda" are the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

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


class _Stream:
    """A CUDA stream without effect: on the CPU the work of a call is done when the call returns."""

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
        # `code_objects.without_cuda` makes functions that use `torch.cuda` and `tensor.cuda()` use `cpu` instead
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


TORCH = _Torch()
