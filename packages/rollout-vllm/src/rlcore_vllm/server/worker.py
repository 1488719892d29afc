"""Extension of the servers' workers: weights from files, in addition to `rlcore_vllm.worker`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlcore_vllm.worker import WorkerExtension


class ServerWorkerExtension(WorkerExtension):
    """The value of ``--worker-extension-cls``; see `WorkerExtension`."""

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
        """Load the files with which the server was started again, tensor by tensor, as version 0."""
        from vllm.model_executor.model_loader import get_model_loader

        loader: Any = get_model_loader(self.vllm_config.load_config)
        self.rlcore_begin()
        for tensor in loader.get_all_weights(self.vllm_config.model_config, self.model_runner.get_model()):
            self.rlcore_load([tensor])
        self.rlcore_finish(0)
