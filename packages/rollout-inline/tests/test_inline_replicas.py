"""Two inline engines with separate copies of the model behind `Replicas` fulfil the contract of one engine."""

from functools import partial
from pathlib import Path

from rlcore.engines import ModelSettings, RolloutSpec
from rlcore_inline.engine import build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.serving.replicas import Replicas
from rlcore_kit.testing.rollout_engine import RolloutEngineConformance


class TestTwoReplicas(RolloutEngineConformance):
    logprob_tolerance = 1e-5

    def make_engine(self, model: Path, max_model_len: int) -> Replicas:
        spec = RolloutSpec(ModelSettings(path=str(model)), InlineSettings(device="cpu"), max_model_len)
        return Replicas([partial(build, spec), partial(build, spec)])


del RolloutEngineConformance
