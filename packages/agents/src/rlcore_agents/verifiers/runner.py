"""`rollout.environment=verifiers`: episodes of an environment of verifiers."""

from __future__ import annotations

import asyncio
from threading import Lock
from typing import TYPE_CHECKING, Any

from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample, Trajectory
from rlcore.engines.rollout import RolloutEngine, SamplingParams
from rlcore.errors import ConfigError, EngineError
from rlcore_agents.verifiers.environment import SECTION, load_environment
from rlcore_agents.verifiers.episode_calls import MODEL, CallServer, EpisodeCalls
from rlcore_agents.verifiers.renderer import renderer_config
from rlcore_agents.verifiers.serving import ServingLoop
from rlcore_agents.verifiers.settings import VerifiersSettings
from rlcore_agents.verifiers.tasks import task_of
from rlcore_agents.verifiers.trajectory import trajectory_of

if TYPE_CHECKING:
    from verifiers.v1 import Episode, ModelContext, Task, Trace


def build(spec: EpisodeSpec) -> EpisodeRunner:
    """Build the runner of episodes of the environment that the configuration describes.

    Raises:
        ConfigError: the environment, the task set or a harness is unknown, or one of their keys is.
        PluginError: verifiers is not installed.
    """
    return VerifiersRunner(spec)


class VerifiersRunner(EpisodeRunner):
    """Plays episodes in an event loop of verifiers, whose model calls a server in this process answers."""

    def __init__(self, spec: EpisodeSpec) -> None:
        options = spec.options
        assert isinstance(options, VerifiersSettings)
        self._spec = spec
        self._env = load_environment(options.env, spec.limits)
        self._renderer = renderer_config(spec)
        self._building = Lock()
        self._calls: CallServer | None = None
        self._loop = ServingLoop(self._env)

    async def run(self, engine: RolloutEngine, sample: PromptSample, seed: int) -> Trajectory:
        """Play the task of ``sample``; the seeds of all completions derive from ``seed``.

        Raises:
            ConfigError: an agent that is trained has sampling parameters other than the run's.
            DataError: the sample names no task of the task set.
            EngineError: the rollout engine failed.
        """
        task = task_of(self._env, sample)
        server = self._server(engine)
        with server.episode(f"{sample.position}-{seed}", seed) as calls:
            playing = self._loop.submit(self._play(task, server, calls))
            calls.on_failure = playing.cancel
            try:
                episode = await asyncio.wrap_future(playing)
            finally:
                if calls.failure is not None:
                    why = f"the rollout engine failed in episode {calls.id}: {calls.failure}"
                    raise EngineError(why) from calls.failure
        for trace in episode.traces:
            _check_sampling(trace, self._spec.sampling)
        complete = self._env.complete(episode)
        return trajectory_of(episode, calls.completions(), sample.prompt_tokens, complete=complete)

    def _server(self, engine: RolloutEngine) -> CallServer:
        with self._building:
            if self._calls is None:
                self._calls = CallServer(engine, self._spec.limits, self._spec.sampling)
            return self._calls

    async def _play(self, task: Task[Any, Any, Any], server: CallServer, calls: EpisodeCalls) -> Episode:
        (slot,) = self._env.slots(task)
        return await self._env.run_slot(
            slot, self._context(server), on_trace=lambda trace: server.add_run(trace, calls)
        )

    def _context(self, server: CallServer) -> ModelContext:
        from verifiers.v1 import ModelContext, SamplingConfig, TrainClientConfig

        sampling = self._spec.sampling
        given = {name: getattr(sampling, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p")}
        return ModelContext(
            model=MODEL,
            client=TrainClientConfig(
                base_url=server.base_url,
                api_key_var="RLCORE_ENDPOINT_API_KEY",  # not set: the key is a header, which processes do not inherit
                headers={"Authorization": f"Bearer {server.key}"},
                renderer=self._renderer,
                renderer_model_name=self._spec.model.tokenizer_path or self._spec.model.path,
            ),
            sampling=SamplingConfig(**given, stop=list(sampling.stop), ignore_eos=sampling.ignore_eos),
        )

    def close(self) -> None:
        """Shut the environment's shared tools and servers down."""
        self._loop.close()
        if self._calls is not None:
            self._calls.close()


def _check_sampling(trace: Trace, wanted: SamplingParams) -> None:
    """Refuse an agent that is trained on tokens of another distribution than the run's."""
    own = trace.agent.config.sampling
    for name in ("temperature", "top_p", "top_k", "min_p"):
        value, ours = getattr(own, name, None), getattr(wanted, name)
        if trace.agent.trainable and value is not None and value != ours:
            raise ConfigError(
                f"{SECTION}.{trace.agent.name}.sampling.{name} is {value}, but agents that are trained sample as the "
                f"run does ({name} {ours}): remove it, and set rollout.{name}"
            )
