"""Lets SGLang's server (0.5.21) start on a CPU without AMX. For tests, which put this folder on its PYTHONPATH.

- The CPU is chosen by SGLANG_USE_CPU_ENGINE, but ``import sgl_kernel`` loads libcuda all the same, as the wheel of the
  registry holds GPU kernels alone. The models of the tests call none of them.
- ``torch.get_device_module()`` without a device has no answer here, and the scheduler dies when memory is released.
- Adapters are computed by the backend ``torch_native``, which pins memory; without a GPU torch refuses to.
"""

import functools
import os
import sys
import types
from importlib.abc import MetaPathFinder


class _TorchOnceItIsThere(MetaPathFinder):
    """Changes torch just before the scheduler is imported: importing torch here would slow down every process."""

    def find_spec(self, name, path=None, target=None):
        if name == "sglang.srt.managers.scheduler":
            import torch

            known = torch.get_device_module
            torch.get_device_module = lambda device=None: torch.cpu if device is None else known(device)
            torch.Tensor.pin_memory = lambda self, device=None: self
            for make in ("empty", "tensor", "zeros"):
                setattr(torch, make, _unpinned(getattr(torch, make)))
            sys.meta_path.remove(self)


def _unpinned(make):
    @functools.wraps(make)
    def wrapped(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return wrapped


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    loader = types.ModuleType("sgl_kernel.load_utils")
    loader._load_architecture_specific_ops = lambda: None
    loader._preload_cuda_library = lambda: None
    sys.modules[loader.__name__] = loader
    sys.meta_path.insert(0, _TorchOnceItIsThere())
