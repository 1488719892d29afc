"""Entry point of the package in rlcore. Imports neither torch nor sglang."""

from rlcore.plugins import Plugin

rollout_engine = Plugin(
    interface=1,
    config="rlcore_sglang.settings:SGLangSettings",
    factory="rlcore_sglang.engine:build",
    summary="SGLang servers, started and supervised by rlcore or already running, tensor parallel",
)
