"""Entry point of the package in rlcore. Imports neither torch nor httpx."""

from rlcore.plugins import Plugin

rollout_engine = Plugin(
    interface=1,
    config="rlcore_http.settings:HTTPSettings",
    factory="rlcore_http.engine:build",
    summary="running servers by URL: text-generation-inference, or OpenAI's /v1/completions with token ids",
)
