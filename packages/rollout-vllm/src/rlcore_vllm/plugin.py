"""Entry point of the package in rlcore. Imports neither torch nor vllm."""

from rlcore.plugins import Plugin

rollout_engine = Plugin(
    interface=1,
    config="rlcore_vllm.settings:VLLMSettings",
    factory="rlcore_vllm.engine:build",
    summary="vLLM in the trainer's process or separate ones, tensor parallel, or running vLLM servers",
)
