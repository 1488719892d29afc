"""The engine that the documentation builds computes what the contract says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlcore.batch import Batch, Jagged
from rlcore.engines import (
    ForwardRequest,
    GenerationRequest,
    ModelSettings,
    OptimSettings,
    RolloutSpec,
    SamplingParams,
    TrainEngine,
    TrainEngineSpec,
    WeightBucket,
    WeightLender,
    sync_weights,
)
from rlcore.errors import EngineError
from rlcore.plugins import get
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import TrainEngineConformance, WeightedLogprobs, make_batch

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
def page() -> dict[str, Any]:
    """The names that the page's blocks define."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        if "class MyEngine" in block or "class MyLendingEngine" in block:
            exec(block, names)
    return names


def complete(partial_class: type) -> type[TrainEngine]:
    """Add what the page's class leaves out: methods that do nothing, and an export of weights."""

    def export_weights(self: Any, bucket_bytes: int = 0) -> Any:
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        yield WeightBucket(tuple(weights.items()))

    left_out = {name: lambda *_: None for name in partial_class.__abstractmethods__}  # type: ignore[attr-defined]
    return type("Complete", (partial_class,), {**left_out, "export_weights": export_weights})


@pytest.fixture(scope="module")
def engine_class(page: dict[str, Any]) -> type[TrainEngine]:
    return complete(page["MyEngine"])


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


def test_the_weights_that_it_lends_pass_the_suite(page: dict[str, Any], model: Path) -> None:
    suite(complete(page["MyLendingEngine"])).test_lent_weights_are_those_that_compute(model)


def inline_rollout(model: Path, engine: TrainEngine) -> Any:
    plugin = get("rlcore.rollout_engines", "inline")
    return plugin.build(RolloutSpec(ModelSettings(path=str(model)), plugin.config_class()(), 64, 0, engine))


def test_the_inline_rollout_generates_with_its_weights(page: dict[str, Any], model: Path) -> None:
    """Before and after a training step, its log-probs are those that the engine computes itself."""
    spec = TrainEngineSpec(ModelSettings(path=str(model)), options=None, optim=OptimSettings(lr=0.1), max_tokens=128)  # type: ignore[arg-type]
    engine = complete(page["MyLendingEngine"])(spec)  # type: ignore[call-arg]
    assert isinstance(engine, WeightLender)
    rollout = inline_rollout(model, engine)
    assert rollout.shares_weights
    prompt = (5, 6, 7)
    requests = [GenerationRequest(prompt, SamplingParams(max_tokens=6 + i, seed=i, ignore_eos=True)) for i in range(3)]
    tokens = []
    for version in range(2):
        completions = rollout.generate_batch(requests)
        tokens.append([completion.tokens for completion in completions])
        for completion in completions:
            batch = Batch({"tokens": Jagged.from_list([[*prompt, *completion.tokens]])})
            own = engine.forward(batch, ForwardRequest())["logprobs"].to_list()[0][len(prompt) :]
            assert completion.logprobs == pytest.approx(own.tolist(), abs=1e-5)
            assert completion.versions == [(version, len(completion.tokens))]
        engine.train(make_batch(), WeightedLogprobs())
        sync_weights(engine, rollout, version + 1)
    assert tokens[0] != tokens[1]


def test_an_engine_that_keeps_its_weights_is_refused(engine_class: type[TrainEngine], model: Path) -> None:
    engine = engine_class(TrainEngineSpec(ModelSettings(path=str(model)), options=None))  # type: ignore[call-arg,arg-type]
    assert not isinstance(engine, WeightLender)
    with pytest.raises(EngineError, match="Complete does not lend its weights"):
        inline_rollout(model, engine)
