"""`build`: one `RolloutEngine` over SGLang servers, started here or running already."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import cast

from rlcore.engines.rollout import RolloutEngine
from rlcore.engines.settings import RolloutSpec
from rlcore_kit.serving.versions import Versions
from rlcore_sglang import quirks
from rlcore_sglang.arguments import server_arguments
from rlcore_sglang.config import SGLangSettings
from rlcore_sglang.process import ServerProcess
from rlcore_sglang.server import ServerRollout
from rlcore_sglang.supervision import Supervised


def build(spec: RolloutSpec) -> RolloutEngine:
    """All servers of ``spec.options`` behind one engine.

    Raises:
        EngineError: a server does not start, is not there, or serves another model; sglang is missing or too old.
    """
    settings = cast(SGLangSettings, spec.options)
    versions = Versions()
    if settings.starts_servers:
        quirks.require_sglang()
        folder = settings.log_dir or Path(tempfile.mkdtemp(prefix="rlcore-sglang-"))
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"SGLang server {index}" for index in range(settings.replicas)]
        factories = [partial(_started, index, folder, spec, settings, versions) for index in range(settings.replicas)]
        patience_s = settings.start_timeout_s
    else:
        names = [url.rstrip("/") for url in settings.urls]
        factories = [partial(ServerRollout, url, spec, settings, versions) for url in names]
        patience_s = settings.rejoin_timeout_s
    return Supervised(
        factories,
        names=names,
        keep=settings.keep_weights,
        seed=spec.seed,
        start_together=True,
        start_timeout_s=settings.start_timeout_s + settings.control_timeout_s,
        timeout_s=settings.weights_timeout_s,
        rejoin_timeout_s=patience_s,
    )


def _started(
    index: int, folder: Path, spec: RolloutSpec, settings: SGLangSettings, versions: Versions
) -> ServerRollout:
    """The server ``index``, which has GPUs of its own and a log that goes on when it is started anew."""
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
        return ServerRollout(process.url, spec, settings, versions, process)
    except BaseException:
        process.stop()
        raise


def _on_cpu(settings: SGLangSettings) -> bool:
    if settings.device is not None:
        return settings.device == "cpu"
    import torch

    return not torch.cuda.is_available()
