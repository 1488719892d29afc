"""What the servers' workers have beyond those of our own engines: they read weights from files."""

from __future__ import annotations

from pathlib import Path

from rlcore_vllm.worker import WorkerExtension


class ServerWorkerExtension(WorkerExtension):
    """The value of ``--worker-extension-cls``; see `WorkerExtension`."""

    def rlcore_read(self, folder: str, version: int) -> int:
        """Load the safetensors files in ``folder`` as ``version``, one file at a time.

        vLLM's own ``reload_weights`` (0.32, CPU) leaves a model with tied embeddings with log-probs of neither model.
        """
        from safetensors import safe_open

        self.rlcore_begin()
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self.rlcore_load([(name, tensors.get_tensor(name)) for name in tensors.keys()])  # noqa: SIM118
        self.rlcore_finish(version)
        return version
