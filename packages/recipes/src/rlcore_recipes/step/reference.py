"""Log-probs of the reference policy: of a second model, or of the actor without the adapters that it trains."""

from __future__ import annotations

from dataclasses import replace

from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest, TrainEngine


def reference_logprobs(
    actor: TrainEngine, ref: TrainEngine | None, batch: Batch, *, temperature: float = 1.0, offload: bool = False
) -> Jagged:
    """Compute per-token log-probs of the reference policy for ``tokens`` where ``loss_mask`` is 1.

    Args:
        ref: the engine of the second model; None if the reference is ``actor``, which trains adapters, without these
            (`rlcore_recipes.settings.roles.RefSettings.is_actor`).
        offload: move the second model to host memory afterwards.
    """
    logprobs: Jagged = reference_forward(actor, ref, batch, temperature=temperature, offload=offload)["logprobs"]
    return logprobs


def reference_forward(
    actor: TrainEngine, ref: TrainEngine | None, batch: Batch, *, temperature: float = 1.0, offload: bool = False
) -> Batch:
    """Return what `reference_logprobs` takes the column ``logprobs`` from, which may be still computed."""
    columns, request = batch.select("tokens", "loss_mask"), ForwardRequest(("logprobs",), temperature)
    if ref is None:
        return actor.forward(columns, replace(request, adapters=False))
    found = ref.forward(columns, request)
    if offload:
        ref.offload()
    return found
