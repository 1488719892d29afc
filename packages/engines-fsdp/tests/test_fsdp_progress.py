"""The engines report how far a call has come."""

from __future__ import annotations

from pathlib import Path

import torch

from rlcore.algorithms.objectives import SFTObjective, SFTObjectiveSettings
from rlcore.batch import Batch, Jagged
from rlcore.engines import (
    ForwardRequest,
    GenerationRequest,
    ModelSettings,
    OptimSettings,
    RolloutSpec,
    SamplingParams,
    TrainEngineSpec,
)
from rlcore.progress import listening
from rlcore_fsdp.engine import build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_inline.engine import build as build_rollout
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.tiny_model import tiny_model


def test_micro_batches_and_completions_are_reported(tmp_path: Path) -> None:
    model = ModelSettings(path=str(tiny_model(tmp_path)))
    engine = build(TrainEngineSpec(model, FSDPSettings(device="cpu"), optim=OptimSettings(), max_tokens=8))
    rollout = build_rollout(RolloutSpec(model, InlineSettings(), max_model_len=32, train_engine=engine))
    lengths = torch.tensor([8, 8, 8])
    batch = Batch({"tokens": Jagged(torch.full((24,), 9), lengths), "loss_mask": Jagged(torch.ones(24), lengths)})
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *args: heard.append(args)):
        engine.forward(batch, ForwardRequest(("logprobs",)))
        engine.train(batch, SFTObjective(SFTObjectiveSettings()))
        rollout.generate_batch(
            [GenerationRequest([9], SamplingParams(max_tokens=length), request_id=str(length)) for length in (1, 5)]
        )
    assert heard[:6] == [
        (what, number, 3)
        for what in ("micro-batches computed (logprobs)", "micro-batches trained on")
        for number in (1, 2, 3)
    ]
    assert heard[6:] == [("completions generated", number, 2) for number in (1, 2)]
