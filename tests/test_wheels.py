"""The published artefacts: wheels and sdists build, install into a clean environment, and run a recipe from there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))


def run(*command: str | Path, cwd: Path, timeout: float = 600) -> str:
    # The clean environment must not see this one.
    foreign = ("VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv")
    assert found, "uv is needed to build the packages: pip install uv"
    return found


@pytest.fixture(scope="module")
def dist(uv: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(uv, "build", "--all-packages", "--out-dir", out, cwd=ROOT)
    return out


def test_every_package_builds_a_wheel_and_an_sdist(dist: Path) -> None:
    assert len(list(dist.glob("*.whl"))) == len(list(dist.glob("*.tar.gz"))) == len(PACKAGES)


def test_wheels_carry_types_licence_and_configs(dist: Path) -> None:
    for wheel in dist.glob("*.whl"):
        names = zipfile.ZipFile(wheel).namelist()
        assert any(name.endswith("/py.typed") for name in names), wheel.name
        assert any(name.endswith("LICENSE") for name in names), wheel.name
        assert not any("/tests/" in name for name in names), wheel.name
    recipes = next(dist.glob("rlcore_recipes-*.whl"))
    assert any(name.endswith("configs/grpo/grpo_gsm8k.yaml") for name in zipfile.ZipFile(recipes).namelist())


@pytest.mark.slow
def test_fsdp_extra_runs_a_recipe_from_wheels_alone(uv: str, dist: Path, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    export = ("export", "--frozen", "--all-packages", "--no-hashes", "--no-emit-workspace")
    run(uv, *export, "-o", constraints, cwd=ROOT)
    run(uv, "venv", "--python", sys.executable, "venv", cwd=tmp_path)
    wheel = next(dist.glob("rlcore-*.whl"))
    requirement = f"rlcore[fsdp] @ {wheel.as_uri()}"
    install = ("pip", "install", "--python", "venv", "--find-links", dist, "-c", constraints)
    run(uv, *install, requirement, cwd=tmp_path)
    rlcore = tmp_path / "venv/bin/rlcore"

    assert "inline" in run(rlcore, "plugins", cwd=tmp_path)
    run(rlcore, "data", "arithmetic", "--out", "data", "--train", "64", "--test", "8", cwd=tmp_path)
    run(rlcore, "model", "new", "--out", "model", "--train-files", "data/train.parquet", cwd=tmp_path)
    overrides = (
        "model.path=model",
        "data.train_files=[data/train.parquet]",
        "data.val_files=[data/test.parquet]",
        "data.train_batch_size=4",
        "data.max_prompt_length=128",
        "data.max_response_length=16",
        "rollout.n=2",
        "reward.name=gsm8k",
        "trainer.total_steps=1",
        "trainer.out_dir=run",
    )
    run(rlcore, "run", "grpo", *overrides, cwd=tmp_path)
    assert (tmp_path / "run/metrics.jsonl").stat().st_size > 0
    script = """
import rlcore
if __name__ == "__main__":
    reward = lambda solution_str, **_: 0.5
    run = rlcore.train("grpo", config="run/config.yaml", reward=reward, out_dir="from-python")
    assert run.metrics["critic/score/mean"].to_pylist() == [0.5]
"""
    run(tmp_path / "venv/bin/python", "-c", script, cwd=tmp_path)
