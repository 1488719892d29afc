"""Extension of the servers' workers: weights from files, and the policy's adapter.

`rlcore_vllm.worker` is the part that engines share which rlcore starts.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlcore_vllm.adapters import begin_with_none, known_adapters, write_placeholder
from rlcore_vllm.worker import WorkerExtension


class ServerWorkerExtension(WorkerExtension):
    """The value of ``--worker-extension-cls``; see `WorkerExtension`.

    For updates of adapters: `rlcore_take_adapters`, and unless the server knows the policy's adapter,
    `rlcore_offer_adapter`, the server's own loading of the folder, `rlcore_adopt_adapter`.
    """

    rlcore_base_replaced = False

    def rlcore_take_adapters(self, adapters: bool) -> int:
        """Have updates bring adapters or full weights; return the maximum rank, 0 without ``--enable-lora``."""
        config = self.vllm_config.lora_config
        self.rlcore_takes_adapters = adapters and config is not None
        return 0 if config is None else int(config.max_lora_rank)

    def rlcore_offer_adapter(self) -> str:
        """Write an adapter that the server can load and that has no effect; return its folder."""
        self.rlcore_offer = TemporaryDirectory(prefix="rlcore-adapter-")
        self.rlcore_others = known_adapters(self.model_runner)
        write_placeholder(self.model_runner, Path(self.rlcore_offer.name))
        return self.rlcore_offer.name

    def rlcore_adopt_adapter(self) -> None:
        """Take the adapter that the server has loaded for the policy's.

        Its folder is removed: if another adapter evicted it, requests would fail, and not be served without it.
        """
        (self.rlcore_adapter,) = known_adapters(self.model_runner) - self.rlcore_others
        self.rlcore_offer.cleanup()

    def rlcore_finish(self, version: int) -> None:
        super().rlcore_finish(version)
        self.rlcore_base_replaced |= not self.rlcore_takes_adapters

    def rlcore_read(self, folder: str, version: int) -> int:
        """Load the safetensors files in ``folder`` as ``version``, one file at a time; return ``version``.

        After vLLM's own ``reload_weights`` (0.32, CPU) a model with tied embeddings has log-probs of neither model.
        """
        from safetensors import safe_open

        self.rlcore_begin()
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self.rlcore_load([(name, tensors.get_tensor(name)) for name in tensors.keys()])  # noqa: SIM118
        self.rlcore_finish(version)
        return version

    def rlcore_restore(self) -> None:
        """Load the files with which the server was started again, tensor by tensor, as version 0.

        With adapters the base weights are those files already, unless full weights were loaded in between.
        """
        adapters = self.rlcore_takes_adapters
        if not adapters or self.rlcore_base_replaced:
            self.rlcore_takes_adapters = False
            self._rlcore_load_files()
            self.rlcore_takes_adapters = adapters
        if adapters:
            begin_with_none(self.model_runner, self.rlcore_adapter)
        self.rlcore_base_replaced = False
        self.rlcore_held_version = 0

    def _rlcore_load_files(self) -> None:
        from vllm.model_executor.model_loader import get_model_loader

        loader: Any = get_model_loader(self.vllm_config.load_config)
        self.rlcore_begin()
        for tensor in loader.get_all_weights(self.vllm_config.model_config, self.model_runner.get_model()):
            self.rlcore_load([tensor])
        self.rlcore_finish(0)
