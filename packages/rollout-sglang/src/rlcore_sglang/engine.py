"""`build`: one `RolloutEngine` over SGLang servers that are started here or run already."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import cast

from rlcore.engines.rollout import RolloutEngine
from rlcore.engines.settings import RolloutSpec
from rlcore_kit.serving.weight_labels import WeightLabels
from rlcore_sglang import quirks
from rlcore_sglang.arguments import server_arguments
from rlcore_sglang.rollout import SGLangServerRollout, connect
from rlcore_sglang.server_process import ServerProcess
from rlcore_sglang.settings import SGLangSettings
from rlcore_sglang.supervision import SupervisedReplicas


def build(spec: RolloutSpec) -> RolloutEngine:
    """Build one engine over all servers of ``spec.options``.

    Raises:
        EngineError: a server does not start, is unreachable, or serves another model; sglang is missing or too old.
    """
    settings = cast(SGLangSettings, spec.options)
    labels = WeightLabels()
    if settings.starts_servers:
        quirks.require_sglang()
        folder = settings.log_dir or Path(tempfile.mkdtemp(prefix="rlcore-sglang-"))
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"SGLang server {index}" for index in range(settings.replicas)]
        factories = [partial(_started, index, folder, spec, settings, labels) for index in range(settings.replicas)]
        rejoin_timeout_s = settings.start_timeout_s
    else:
        names = [url.rstrip("/") for url in settings.urls]
        factories = [partial(connect, url, spec, settings, labels) for url in names]
        rejoin_timeout_s = settings.rejoin_timeout_s
    return SupervisedReplicas(
        factories,
        names=names,
        keep_weights=settings.keep_weights,
        seed=spec.seed,
        start_together=True,
        start_timeout_s=settings.start_timeout_s + settings.control_timeout_s,
        timeout_s=settings.weights_timeout_s,
        rejoin_timeout_s=rejoin_timeout_s,
    )


def _started(
    index: int, folder: Path, spec: RolloutSpec, settings: SGLangSettings, labels: WeightLabels
) -> SGLangServerRollout:
    """Start the server ``index`` on its own GPUs and connect to it; a restarted server appends to the same log."""
    on_cpu = _on_cpu(settings)
    arguments = server_arguments(spec, settings, on_cpu)
    arguments["context_length"] += quirks.CONTEXT_SLACK
    if on_cpu:
        arguments = {**quirks.cpu_arguments(), **arguments}
    else:
        arguments.setdefault("base_gpu_id", index * settings.tp_size)
    process = ServerProcess(
        arguments,
        settings.args,
        folder / f"server-{index}.log",
        {**quirks.environment(on_cpu, settings.tp_size), **settings.env},
        settings.start_timeout_s,
    )
    try:
        return connect(process.url, spec, settings, labels, process)
    except BaseException:
        process.stop()
        raise


def _on_cpu(settings: SGLangSettings) -> bool:
    if settings.device is not None:
        return settings.device == "cpu"
    import torch

    return not torch.cuda.is_available()
