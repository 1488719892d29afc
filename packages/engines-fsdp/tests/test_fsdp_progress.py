"""The engine reports the progress of a call."""

from __future__ import annotations

from pathlib import Path

import torch

from rlcore.algorithms.objectives import SFTObjective, SFTObjectiveSettings
from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngineSpec
from rlcore.progress import listening
from rlcore_fsdp.engine import build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.testing.tiny_model import tiny_model


def test_micro_batches_are_reported(tmp_path: Path) -> None:
    model = ModelSettings(path=str(tiny_model(tmp_path)))
    engine = build(TrainEngineSpec(model, FSDPSettings(device="cpu"), optim=OptimSettings(), max_tokens=8))
    lengths = torch.tensor([8, 8, 8])
    batch = Batch({"tokens": Jagged(torch.full((24,), 9), lengths), "loss_mask": Jagged(torch.ones(24), lengths)})
    reported: list[tuple[str, int, int]] = []
    with listening(lambda *args: reported.append(args)):
        engine.forward(batch, ForwardRequest(("logprobs",)))
        engine.train(batch, SFTObjective(SFTObjectiveSettings()))
    assert reported == [
        (what, number, 3)
        for what in ("micro-batches computed (logprobs)", "micro-batches trained on")
        for number in (1, 2, 3)
    ]
