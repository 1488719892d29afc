import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "ray", "pyarrow", "numpy"}


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import rlcore",
        "import rlcore.config, rlcore.plugins, rlcore.config.registry, rlcore.errors, rlcore.tracking",
        "from rlcore.engines.settings import ModelSettings",
        "from rlcore.engines import Reward, RewardSettings",
        "from rlcore.cli.command_tree import cli",
        "from click.testing import CliRunner; from rlcore.cli.command_tree import cli\n"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0",
        "from click.testing import CliRunner; from rlcore.cli.command_tree import cli\n"
        "assert CliRunner().invoke(cli, ['config', 'validate', 'grpo', '-c', 'gone.yaml']).exit_code == 1",
        "from click.testing import CliRunner; from rlcore.cli.command_tree import cli\n"
        "assert CliRunner().invoke(cli, ['run']).exit_code == 0",
    ],
)
def test_loads_nothing_heavy(statement):
    assert not modules_after(statement) & HEAVY


def test_import_takes_less_than_half_a_second_of_cpu_time():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", "import rlcore"], check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5  # interpreter start included
