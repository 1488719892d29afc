"""Building the engine: megatron-core must not be imported before it is known whether it computes on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlcore.engines import TrainEngineSpec
from rlcore.engines.device import choose_device
from rlcore.errors import EngineError
from rlcore_megatron import cpu
from rlcore_megatron.config import MegatronSettings

if TYPE_CHECKING:
    from rlcore_megatron.train_engine import MegatronEngine


def build(spec: TrainEngineSpec) -> MegatronEngine:
    """The engine of this process; under ``torchrun``'s environment every process calls it.

    Raises:
        EngineError: the model cannot be loaded or divided, or the settings do not fit this machine.
    """
    if not isinstance(spec.options, MegatronSettings):
        raise EngineError(f"options of the megatron engine are MegatronSettings, not {type(spec.options).__name__}")
    device = choose_device(spec.options.device)
    if device.type == "cpu":
        cpu.install()
    elif cpu.installed():
        raise EngineError("this process has used megatron-core on the CPU and cannot use it on CUDA any more")
    from rlcore_megatron.train_engine import MegatronEngine

    return MegatronEngine(spec, spec.options, device)
