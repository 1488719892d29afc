"""Every rollout engine over HTTP, with vLLM's token protocol (``/inference/v1/generate``), one address per episode.

endpoint = Endpoint()
with endpoint.session(engine, model="policy", max_model_len=4096) as session:
    ...  # POST {session.url}/inference/v1/generate with "Authorization: Bearer {session.key}"
endpoint.close()
"""

from rlcore_agents.endpoint.endpoint import Endpoint
from rlcore_agents.endpoint.session import Refusal, Session

__all__ = ["Endpoint", "Refusal", "Session"]
