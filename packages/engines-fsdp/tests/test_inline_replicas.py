"""Two inline engines with weights of their own behind `Replicas`: the contract of one engine."""

from functools import partial
from pathlib import Path

from rlcore.engines import ModelSettings, Replicas, RolloutSpec
from rlcore.testing.rollout_engine import RolloutEngineConformance
from rlcore_fsdp.inline.config import InlineSettings
from rlcore_fsdp.inline.engine import build


class TestTwoReplicas(RolloutEngineConformance):
    logprob_tolerance = 1e-5

    def make_engine(self, model: Path, max_model_len: int) -> Replicas:
        spec = RolloutSpec(ModelSettings(path=str(model)), InlineSettings(device="cpu"), max_model_len)
        return Replicas([partial(build, spec), partial(build, spec)])


del RolloutEngineConformance
