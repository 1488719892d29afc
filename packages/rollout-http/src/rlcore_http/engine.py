"""`build`: one `RolloutEngine` over all servers, after a handshake with each."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from rlcore.engines.rollout import RolloutEngine
from rlcore.engines.settings import RolloutSpec
from rlcore.errors import EngineError
from rlcore_http.control import ClientControl
from rlcore_http.openai_completions import OpenAICompletions
from rlcore_http.probe import probe
from rlcore_http.protocol import Abilities, ServerProtocol
from rlcore_http.reload import Reloads
from rlcore_http.rollout import HTTPRollout
from rlcore_http.settings import HTTPSettings
from rlcore_http.tgi import ABILITIES, TGI
from rlcore_kit.model_folder.tokenizer import load_tokenizer
from rlcore_kit.model_folder.vocabulary import vocabulary
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.handshake import Handshake
from rlcore_kit.serving.replicas import Replicas
from rlcore_kit.serving.server_rollout import open_connection
from rlcore_kit.serving.weight_labels import WeightLabels

PROBE = "The quick brown fox jumps over the lazy dog."


def build(spec: RolloutSpec) -> RolloutEngine:
    """Build one engine over the servers of ``spec.options``.

    Raises:
        EngineError: a server is unreachable, serves another model, or returns no token ids.
    """
    settings = cast(HTTPSettings, spec.options)
    tokenizer = load_tokenizer(spec.model)
    labels, reloads = WeightLabels(), Reloads(settings, spec.model)
    urls = [_base(url) for url in settings.urls]
    return Replicas(
        [partial(connect, url, spec, settings, tokenizer, labels, reloads) for url in urls],
        names=urls,
        refresh=lambda engine: cast(HTTPRollout, engine).restore(),
        seed=spec.seed,
        start_together=True,
        start_timeout_s=settings.reload_timeout_s + settings.control_timeout_s,
        timeout_s=max(settings.weights_timeout_s, settings.reload_timeout_s),
        rejoin_timeout_s=settings.rejoin_timeout_s,
    )


def connect(
    url: str,
    spec: RolloutSpec,
    settings: HTTPSettings,
    tokenizer: Any,
    labels: WeightLabels,
    reloads: Reloads,
) -> HTTPRollout:
    """Connect to the server at ``url``; see `HTTPRollout` for the arguments.

    Raises:
        EngineError, WorkerError: see `build`.
    """
    connection = open_connection(url, settings, settings.api_key(), settings.headers)
    try:
        protocol = choose_protocol(connection, settings, tokenizer)
        protocol.shake_hands(settings.model, spec.model.path, spec.max_model_len)
        version = reloads.load_current(connection)
        prompt = list(tokenizer(PROBE).input_ids)
        abilities = connection.wait_for(_abilities(protocol, prompt), "complete a first request")
        handshake = Handshake(version, 1, *vocabulary(spec.model))
        control = ClientControl(connection)
        return HTTPRollout(control, protocol, abilities, handshake, spec, settings, tokenizer, labels, reloads)
    except BaseException:
        connection.close()
        raise


def choose_protocol(connection: Connection, settings: HTTPSettings, tokenizer: Any) -> ServerProtocol:
    """Return the protocol that ``settings`` name, or that the server speaks.

    Raises:
        EngineError: the server speaks neither.
        WorkerError: it is unreachable.
    """
    name: str = settings.protocol
    failures = []
    if name == "auto":
        for name, path in (("tgi", "/info"), ("openai", "/v1/models")):
            try:
                answer = connection.ask("GET", path, "describe its model")
            except EngineError as error:
                if "(401" in str(error):
                    raise
                failures.append(str(error))
                continue
            if isinstance(answer, dict) and ("model_id" if name == "tgi" else "data") in answer:
                break
            failures.append(f"its {path} does not describe a model")
        else:
            raise EngineError(
                f"{connection.url} is neither text-generation-inference (/info) nor OpenAI-compatible (/v1/models): "
                + "; ".join(failures)
            )
    if name == "tgi":
        return TGI(connection, settings.request_fields, tokenizer)
    return OpenAICompletions(connection, settings.request_fields)


async def _abilities(protocol: ServerProtocol, prompt: list[int]) -> Abilities:
    """Return what the server's sampling does; that of text-generation-inference is known."""
    if isinstance(protocol, TGI):
        await protocol.check_tokenizer(prompt)
        return ABILITIES
    return await probe(protocol, prompt)


def _base(url: str) -> str:
    """Return ``url`` without a last ``/v1``, which clients of OpenAI's protocol usually name."""
    return url.rstrip("/").removesuffix("/v1")
