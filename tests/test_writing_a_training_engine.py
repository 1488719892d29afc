"""The engine that the documentation builds computes what the contract says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlcore.engines import TrainEngine, TrainEngineSpec, WeightBucket
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import TrainEngineConformance

PAGE = Path(__file__).parent.parent / "docs" / "writing-a-training-engine.md"
COMPUTING = (
    "test_forward_is_exactly_zero_where_masked",
    "test_forward_of_nothing_is_nothing",
    "test_steps_equal_plain_adamw",
    "test_a_step_does_not_depend_on_micro_batches",
    "test_samples_that_belong_together_are_in_one_micro_batch",
    "test_a_step_that_broke_off_leaves_nothing",
)


@pytest.fixture(scope="module")
def engine_class() -> type[TrainEngine]:
    """The class on the page; what it leaves out does nothing, but for the export of weights."""
    code = re.search(r"^```python\n(import math\n.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"__name__": "page"}
    exec(code[1], names)

    def export_weights(self: Any, bucket_bytes: int = 0) -> Any:
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        yield WeightBucket(tuple(weights.items()))

    left_out = {name: lambda *_: None for name in TrainEngine.__abstractmethods__ - vars(names["MyEngine"]).keys()}
    return type("Whole", (names["MyEngine"],), {**left_out, "export_weights": export_weights})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def suite(engine_class: type[TrainEngine]) -> TrainEngineConformance:
    class Suite(TrainEngineConformance):
        def make_engine(self, spec: TrainEngineSpec) -> TrainEngine:
            return engine_class(spec)  # type: ignore[call-arg]

    return Suite()


@pytest.mark.parametrize("test", COMPUTING)
def test_it_passes_the_suite(engine_class: type[TrainEngine], model: Path, test: str) -> None:
    getattr(suite(engine_class), test)(model)


def test_it_equals_transformers(engine_class: type[TrainEngine], model: Path) -> None:
    suite(engine_class).test_forward_equals_plain_transformers(model, 0.7)


def test_it_skips_steps_without_finite_gradient(engine_class: type[TrainEngine], model: Path) -> None:
    suite(engine_class).test_a_step_without_finite_gradient_is_skipped(model, float("nan"))
