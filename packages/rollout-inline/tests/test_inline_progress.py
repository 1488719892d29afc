"""The engine reports the progress of a call."""

from __future__ import annotations

from pathlib import Path

from rlcore.engines import GenerationRequest, ModelSettings, RolloutSpec, SamplingParams
from rlcore.progress import listening
from rlcore_inline.engine import build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.tiny_model import tiny_model


def test_completions_are_reported(tmp_path: Path) -> None:
    model = ModelSettings(path=str(tiny_model(tmp_path)))
    rollout = build(RolloutSpec(model, InlineSettings(device="cpu"), max_model_len=32))
    reported: list[tuple[str, int, int]] = []
    with listening(lambda *args: reported.append(args)):
        rollout.generate_batch(
            [GenerationRequest([9], SamplingParams(max_tokens=length), request_id=str(length)) for length in (1, 5)]
        )
    assert reported == [("completions generated", number, 2) for number in (1, 2)]
