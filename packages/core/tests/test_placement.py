"""Which role runs where, as configured."""

import pytest

from rlcore.config import Config, load_config
from rlcore.controller.placement import ResourcePool, complete, pools_of, unknown_pool
from rlcore.errors import ConfigError

MODELS = ["actor", "critic", "ref", "reward_model", "rollout"]


def pools(*names: str) -> dict[str, ResourcePool]:
    return {name: ResourcePool() for name in names}


@pytest.mark.parametrize(
    ("own", "placement", "expected"),
    [
        ((), {}, dict.fromkeys(MODELS, "default")),
        (("gpus",), {}, dict.fromkeys(MODELS, "gpus")),
        (("gpus", "cpu"), {}, dict.fromkeys(MODELS, "gpus")),
        (
            ("train", "gen"),
            {"actor": "train", "rollout": "gen"},
            {**dict.fromkeys(MODELS, "default"), "actor": "train", "rollout": "gen"},
        ),
    ],
)
def test_models_go_to_the_only_pool_unless_placed(own, placement, expected):
    assert pools_of(pools(*own), placement, MODELS) == expected


def test_rewards_and_work_on_tokens_go_to_the_pool_cpu_unless_placed():
    assert pools_of(pools("gpus"), {}, ["reward", "compute"]) == {"reward": "cpu", "compute": "cpu"}
    assert pools_of(pools("gpus"), {"reward": "gpus"}, ["reward", "compute"]) == {"reward": "gpus", "compute": "cpu"}


def test_pools_that_always_exist_have_defaults_unless_configured():
    configured = {"cpu": ResourcePool(processes=3)}
    assert complete(configured, ["default", "cpu", "default"]) == {
        "default": ResourcePool(),
        "cpu": configured["cpu"],
    }


def test_an_unknown_pool_is_named_with_those_there_are_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"critic cannot be placed: there is no pool 'trian' \(did you mean 'train'\?\)"
    ):
        pools_of(pools("train", "gen"), {"critic": "trian"}, ["critic"])
    assert unknown_pool("xyz", ["train", "gen"]) == "there is no pool 'xyz'; the pools are train, gen"
    assert unknown_pool("cpu", []) is None


class Settings(Config):
    pool: ResourcePool = ResourcePool()


@pytest.mark.parametrize(
    "override", ["pool.processes=0", "pool.cpus_per_process=-1", "pool.gpus_per_process=1.5", "pool.strategy=tight"]
)
def test_pools_that_cannot_be_are_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        load_config(Settings, None, [override])


def test_fractions_of_one_and_whole_gpus_are_fine():
    assert [load_config(Settings, None, [f"pool.gpus_per_process={n}"]).pool.gpus_per_process for n in (0.5, 1, 2)]
