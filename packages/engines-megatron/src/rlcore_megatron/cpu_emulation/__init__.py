"""Megatron-core 0.16.1 on a machine without CUDA: for tests, and for debugging a configuration on a laptop.

Nothing in production imports this package: `rlcore_megatron.engine.build` does, and only where the device is the CPU.

Megatron uses CUDA by name in some hundred places, most of which only determine where tensors are. `install` replaces
these names within megatron's own modules; ``torch`` itself, and what all other modules see of it, stays as it is:

- the name ``torch`` in every megatron module becomes `torch_on_cpu.TORCH`, whose ``cuda`` is the CPU and whose tensor
  factories accept ``device="cuda"`` for it; all other attributes are those of torch;
- functions that compare ``Tensor.type()`` with ``"torch.cuda.FloatTensor"`` or call ``Tensor.cuda()`` get these
  constants and names changed in their own code objects (`code_objects`);
- ``jit_fuser`` (``torch.compile``) does nothing: kernels for tiny test models take longer to compile than to run;
- the random state of the CUDA device is the one of the CPU;
- tokens travel between experts by collectives that gloo has (`experts`).

It cannot be undone: a process that has used Megatron on the CPU cannot use it on CUDA.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from rlcore.errors import EngineError
from rlcore_megatron.cpu_emulation import experts
from rlcore_megatron.cpu_emulation.code_objects import functions_of, without_cuda
from rlcore_megatron.cpu_emulation.torch_on_cpu import TORCH

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
        EngineError: megatron-core was imported before, so that parts of it already refer to CUDA.
    """
    if installed():
        return
    if _JIT in sys.modules:
        raise EngineError(
            "cannot use megatron-core on the CPU: another module has imported it in this process before the engine was "
            "built; build the engine first"
        )
    sys.modules[_JIT] = _jit_without_compiler()
    for name in _IMPORTED:
        importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and getattr(module, "torch", None) is torch:
            module.torch = TORCH  # type: ignore[attr-defined]
    for name in _NAMES_CUDA_TENSORS:
        for function in functions_of(sys.modules[name]):
            function.__code__ = without_cuda(function.__code__)
    random: Any = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    experts.patch_moe()


def installed() -> bool:
    """Return whether megatron-core computes on the CPU in this process."""
    return getattr(sys.modules.get(_JIT), "__rlcore_cpu__", False)


def _jit_without_compiler() -> ModuleType:
    """Return a replacement for ``megatron.core.jit``, which applies ``torch.compile`` to 41 functions at import.

    The environment variable that disables torch's compiler would disable it for all other code of the process too.
    """
    module: Any = ModuleType(_JIT)
    module.jit_fuser = module.noop_decorator = lambda function: function
    module.enable_jit_fuser = module.disable_jit_fuser = lambda: None
    module.__rlcore_cpu__ = True
    return module  # type: ignore[no-any-return]
