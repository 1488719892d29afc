"""Updates of the policy's LoRA adapters on a server; the base weights stay.

SGLang (0.5.21) loads an adapter under a new name only, and unloads one when no request uses it. So each version is a
separate adapter, whose name is the label of the version, and requests name the newest one. Requests that are unfinished
in an update would keep the old one: they are ended on the server and continued with the new one
(``pause_mode: abort``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rlcore.engines.settings import RolloutSpec
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.weight_stream import Shapes
from rlcore_sglang import payload

PREFIX = "base_model.model."
"""Prefix of the names in PEFT's files (`rlcore.engines.TrainEngine.export_adapters`)."""
NAME = "rlcore-policy-"
"""Prefix of the names of adapters that rlcore loads."""


def trained_rank(spec: RolloutSpec) -> int:
    """Return the rank of the policy's adapters.

    Raises:
        EngineError: it has none.
    """
    if spec.adapter_rank is None:
        raise EngineError(
            "rollout.sglang.enable_lora: the policy trains full weights; have it train adapters (actor.fsdp.lora), or "
            "set enable_lora to false"
        )
    return spec.adapter_rank


def check_server(url: str, info: dict[str, Any], rank: int) -> None:
    """Check by its settings ``info`` that a running server takes adapters of ``rank``.

    Raises:
        EngineError: it was not started for them.
    """
    limit = int(info.get("max_lora_rank") or 0) if info.get("enable_lora") else 0
    if rank > limit:
        takes = f"takes adapters of rank {limit} at most" if limit else "takes no adapters"
        raise EngineError(
            f"{url} {takes}, and the policy trains adapters of rank {rank}; start it with --enable-lora "
            f"--max-lora-rank {rank} --lora-target-modules all"
        )


class Adapters:
    """The policy's adapters on one server.

    Args:
        workers: number of processes that share the model.
        shapes: of the model's tensors; empty if unknown.

    Attributes:
        name: of the adapter that requests use; None before the first update.
    """

    def __init__(self, connection: Connection, workers: int, shapes: Shapes, timeout_s: float) -> None:
        self._connection, self._workers, self._shapes, self._timeout_s = connection, workers, shapes, timeout_s
        self.name: str | None = None

    def continue_with(self, label: str | None) -> None:
        """Use the adapters of ``label``, which are loaded; None: the base model alone. Unload all others."""
        self.name = None if label is None else _named(label)
        self.unload(keep=self.name)

    def send(self, buckets: Iterable[WeightBucket], label: str) -> None:
        """Load the adapters in ``buckets`` as those of ``label``, and unload all others that rlcore has loaded.

        Raises:
            EngineError: an adapter is incomplete or belongs to no layer of the model, or the server refuses them.
        """
        tensors = [(name, tensor.detach().cpu()) for bucket in buckets for name, tensor in bucket.tensors]
        rank = check_complete(tensors, self._shapes)  # also alpha: B includes the scaling
        layers = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name, _ in tensors})
        new = _named(label)
        self.unload(keep=self.name)
        body = {
            "lora_name": new,
            "config_dict": {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers},
            "serialized_named_tensors": [payload.serialized(tensors)] * self._workers,
            "load_format": payload.FORMAT,
        }
        self._post("/load_lora_adapter_from_tensors", "load adapters", body)
        self.name = new
        self.unload(keep=new)

    def unload(self, keep: str | None) -> None:
        """Unload the adapters that rlcore has loaded, also in earlier runs, but for ``keep``."""
        cards = self._connection.ask("GET", "/v1/models", "list its adapters")["data"]
        for name in (str(card["id"]) for card in cards):
            if name.startswith(NAME) and name != keep:
                self._post("/unload_lora_adapter", f"unload the adapters {name}", {"lora_name": name})

    def _post(self, path: str, what: str, body: Any) -> None:
        self._connection.ask("POST", path, what, body=body, timeout_s=self._timeout_s)


def _named(label: str) -> str:
    return NAME + label.replace(":", "-")


def check_complete(tensors: Iterable[tuple[str, torch.Tensor]], shapes: Shapes) -> int:
    """Check that ``tensors`` are pairs of matrices for layers of the model; return their rank.

    Raises:
        EngineError: there is none, one lacks a matrix, is no adapter, or belongs to no layer.
    """
    found = dict(tensors)
    ranks = set()
    for name, tensor in found.items():
        layer, is_adapter, part = name.removesuffix(".weight").rpartition(".lora_")
        if not is_adapter or part not in ("A", "B"):
            raise EngineError(f"the server was started with enable_lora and accepts adapters, not {name}")
        if f"{layer}.lora_{'B' if part == 'A' else 'A'}.weight" not in found:
            raise EngineError(f"the update lacks a matrix of {layer}")
        shape = shapes.get(f"{layer.removeprefix(PREFIX)}.weight")
        fits = shape is None or tensor.shape[1 if part == "A" else 0] == shape[1 if part == "A" else 0]
        if (shapes and shape is None) or not fits:
            raise EngineError(f"the update holds {name} of shape {list(tensor.shape)}, and the model has no such layer")
        ranks.add(len(tensor) if part == "A" else tensor.shape[1])
    if len(ranks) != 1:
        raise EngineError(f"the update holds adapters of {len(ranks)} ranks; all have the same one")
    return ranks.pop()
