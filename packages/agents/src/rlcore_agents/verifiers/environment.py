"""Environments and task sets of verifiers by id and configuration, checked before anything runs."""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

from rlcore.boundary import boundary
from rlcore.engines.episode import EpisodeLimits
from rlcore.errors import ConfigError, PluginError
from rlcore_agents.verifiers.settings import PACKAGE

if TYPE_CHECKING:
    from verifiers.v1 import AgentConfig, Env, EnvConfig, Taskset

SECTION = "rollout.environment.verifiers.env"


def load_environment(env: dict[str, Any], limits: EpisodeLimits) -> Env[Any]:
    """Return the environment that ``env`` describes, with the keys that ``vf-eval`` takes below ``--env``.

    Args:
        limits: what an episode may use; limits that ``env`` sets are kept where they are narrower.

    Raises:
        ConfigError: a task set, an environment or a harness is unknown, or a key is.
        PluginError: verifiers is not installed.
    """
    _require_package()
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config

    with _one_sentence(SECTION):
        config = resolve_env_config(_with_null_harness(copy.deepcopy(env)))
        return load_environment(_limited(config, limits))


def load_tasks(taskset: str, config: dict[str, Any]) -> Taskset[Any, Any]:
    """Return the task set ``taskset`` with ``config``.

    Raises:
        ConfigError: it is unknown, or a key of ``config`` is.
        PluginError: verifiers is not installed.
    """
    _require_package()
    from verifiers.v1.utils.loaders import load_taskset, taskset_config_type

    with _one_sentence(f"taskset {taskset}"):
        return load_taskset(taskset_config_type(taskset).model_validate({**config, "id": taskset}))


def _require_package() -> None:
    if not PACKAGE.installed:
        raise PluginError(f"the environment 'verifiers' {PACKAGE.advice}")


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn errors of a configuration into a ConfigError that names the keys, or what is installed."""
    from pydantic import ValidationError

    with boundary(what, ConfigError):
        try:
            yield
        except ModuleNotFoundError as error:
            raise ConfigError(f"{what}: {error} Installed task sets: {', '.join(_task_sets())}.") from error
        except ValidationError as error:
            raise ConfigError(f"{what}: {'; '.join(map(_problem, error.errors()))}") from error


def _problem(error: Mapping[str, Any]) -> str:
    said = "unknown key" if error["type"] == "extra_forbidden" else error["msg"]
    return f"{'.'.join(map(str, error['loc']))}: {said}"


def _task_sets() -> list[str]:
    """Return the task sets that verifiers ships, and the installed packages that require it."""
    from verifiers.v1 import tasksets

    shipped = [module.name for module in pkgutil.iter_modules(tasksets.__path__)]
    others = {
        package.metadata["Name"]
        for package in distributions()
        if any(need.startswith("verifiers") and "extra ==" not in need for need in package.requires or ())
    }
    return sorted({*shipped, *others} - {"rlcore-agents"})


def _with_null_harness(env: dict[str, Any]) -> dict[str, Any]:
    """Write the name of the harness ``null`` where YAML made it nothing, which verifiers would take for ``bash``."""
    for agent in env.values():
        harness = agent.get("harness") if isinstance(agent, dict) else None
        if isinstance(harness, dict) and "id" in harness and harness["id"] is None:
            harness["id"] = "null"
    return env


def _limited(config: EnvConfig, limits: EpisodeLimits) -> EnvConfig:
    """Return ``config`` with what an episode may use, and with the runtimes that its agents may have by default."""
    from verifiers.v1.configs.agent import agent_config_fields

    seconds = {name: _least(getattr(config.timeout, name), limits.timeout_s) for name in ("episode", "finalize")}
    timeout = config.timeout.model_copy(update=seconds)
    agents = {}
    for name, agent in agent_config_fields(config).items():
        agents[name] = agent.model_copy(
            update={
                "max_turns": _least(agent.max_turns, limits.max_turns),
                "runtime": _runtime(name, agent, config),
            }
        )
    return config.model_copy(update={"timeout": timeout, **agents})


def _runtime(name: str, agent: AgentConfig, config: EnvConfig) -> Any:
    """Return where an agent's program runs; a program that runs no commands of the model may run on this machine.

    Raises:
        ConfigError: the program runs commands of the model, and no runtime is chosen.
    """
    from verifiers.v1 import SubprocessConfig
    from verifiers.v1.utils.loaders import harness_class

    if "runtime" in agent.model_fields_set:
        return agent.runtime
    harness = config.agent_harnesses()[name].id
    if harness_class(harness).EXECUTES_CODE:
        raise ConfigError(
            f"{SECTION}.{name}.runtime.type is not set, and the harness {harness!r} runs commands that the model "
            "writes: choose docker, podman, apptainer, prime, modal or e2b, or subprocess to run them on this machine "
            "without isolation"
        )
    return SubprocessConfig()


def _least(*limits: float | None) -> Any:
    return min(limit for limit in limits if limit is not None)
