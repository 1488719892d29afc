"""Entry points of the package in rlcore. Imports neither torch nor httpx."""

from rlcore.plugins import Plugin

rollout_engine = Plugin(
    interface=1,
    config="rlcore_http.settings:HTTPSettings",
    factory="rlcore_http.engine:build",
    summary="running servers by URL: text-generation-inference, or OpenAI's /v1/completions with token ids",
)
scoring_engine = Plugin(
    interface=1,
    config="rlcore_http.scoring.settings:HTTPScoringSettings",
    factory="rlcore_http.scoring.engine:build",
    summary="log-probs of given tokens from running servers by URL: vLLM or SGLang",
)
