"""The published artefacts: wheels and sdists build, install into a clean environment, and run a recipe from there."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

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


@pytest.fixture(scope="module")
def clean(uv: str, dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment ``venv`` that holds ``rlcore[fsdp,testing]`` from the wheels, a model and data."""
    folder = tmp_path_factory.mktemp("clean")
    export = ("export", "--frozen", "--all-packages", "--no-hashes", "--no-emit-workspace")
    run(uv, *export, "-o", folder / "constraints.txt", cwd=ROOT)
    run(uv, "venv", "--python", sys.executable, "venv", cwd=folder)
    wheel = next(dist.glob("rlcore-*.whl"))
    install(uv, dist, folder, f"rlcore[fsdp,testing] @ {wheel.as_uri()}")
    rlcore = folder / "venv/bin/rlcore"
    run(rlcore, "data", "arithmetic", "--out", "runs/data", "--train", "64", "--test", "8", cwd=folder)
    run(rlcore, "model", "new", "--out", "runs/model", "--train-files", "runs/data/train.parquet", cwd=folder)
    return folder


def install(uv: str, dist: Path, folder: Path, requirement: str | Path) -> None:
    options = ("--python", "venv", "--find-links", dist, "-c", "constraints.txt")
    run(uv, "pip", "install", *options, requirement, cwd=folder)


@pytest.mark.slow
def test_fsdp_extra_runs_a_recipe_from_wheels_alone(clean: Path) -> None:
    rlcore = clean / "venv/bin/rlcore"
    assert "inline" in run(rlcore, "plugins", cwd=clean)
    overrides = (
        "model.path=runs/model",
        "data.train_files=[runs/data/train.parquet]",
        "data.val_files=[runs/data/test.parquet]",
        "data.train_batch_size=4",
        "data.max_prompt_length=128",
        "data.max_response_length=16",
        "rollout.n=2",
        "reward.name=gsm8k",
        "trainer.total_steps=1",
        "trainer.out_dir=run",
    )
    run(rlcore, "run", "grpo", *overrides, cwd=clean)
    assert (clean / "run/metrics.jsonl").stat().st_size > 0
    script = """
import rlcore
if __name__ == "__main__":
    reward = lambda solution_str, **_: 0.5
    run = rlcore.train("grpo", config="run/config.yaml", reward=reward, out_dir="from-python")
    assert run.metrics["critic/score/mean"].to_pylist() == [0.5]
"""
    run(clean / "venv/bin/python", "-c", script, cwd=clean)


@pytest.mark.slow
def test_a_recipe_of_another_repository_runs_from_its_wheel(uv: str, dist: Path, clean: Path, tmp_path: Path) -> None:
    """``examples/my_task``: its recipe, loss, estimator and configuration are found by entry point."""
    shutil.copytree(ROOT / "examples/my_task", tmp_path / "my_task")
    run(uv, "build", "--wheel", "--out-dir", tmp_path, tmp_path / "my_task", cwd=tmp_path)
    install(uv, dist, clean, next(tmp_path.glob("my_task-*.whl")))
    readme = (ROOT / "examples/my_task/README.md").read_text()
    commands = [line.split() for line in readme.partition("```bash\n")[2].partition("```")[0].splitlines()]
    assert [command[0] for command in commands] == ["pip", "rlcore", "rlcore", "rlcore"]
    keys, *_ = (run(clean / "venv/bin/rlcore", *command[1:], cwd=clean) for command in commands[1:])
    assert "solved_from" in keys
    last = json.loads((clean / "runs/hard-prompts/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["my_task/solve_rate"]) == (2, last["critic/score/mean"])
    config = yaml.safe_load((clean / "runs/hard-prompts/config.yaml").read_text())
    assert config["actor"]["objective"]["policy_loss"] == {"name": "focal", "gamma": 1.0}
    run(clean / "venv/bin/python", "-m", "pytest", "-q", tmp_path / "my_task/tests", cwd=tmp_path)
