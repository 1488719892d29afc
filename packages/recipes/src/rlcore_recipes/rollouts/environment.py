"""Episodes of an environment: who runs them in a rollout process, and what holds for their trajectories.

A rollout process builds one `EpisodeRunner` per purpose (training, validation), when its first episode is run.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
from dataclasses import dataclass, replace
from threading import Lock
from weakref import WeakKeyDictionary

from rlcore import plugins
from rlcore.boundary import boundary
from rlcore.engines import RolloutEngine
from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample, Segment, Trajectory
from rlcore.errors import EngineError
from rlcore_recipes.rollouts.episode import Episode
from rlcore_recipes.rollouts.invalid import Reasons
from rlcore_recipes.run.seeds import sample_seed
from rlcore_recipes.settings.environment import EnvironmentRole

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""How much longer than its timeout an episode may take: runners end their episodes themselves, and keep the tokens."""


@dataclass(frozen=True)
class EnvironmentEpisode:
    """The `Episode` of the environment ``name``; picklable.

    Attributes:
        retries: how often an invalid episode is run again.
    """

    name: str
    spec: EpisodeSpec
    retries: int = 0

    async def __call__(self, engine: RolloutEngine, sample: PromptSample, seed: int) -> Trajectory:
        """Run the episode with ``seed``; while it is invalid and retries are left, again with a seed derived from it.

        Raises:
            EngineError: the runner failed, or returned what is no trajectory within the limits.
        """
        runner = _runner(engine, self)
        for retry in range(self.retries + 1):
            own = seed if retry == 0 else sample_seed(seed, "retry", sample.position, retry)
            async with runner.slot():
                trajectory = await self._run(runner, engine, sample, own)
            if not trajectory.invalid:
                break
            if _reasons.add(trajectory.invalid):
                found = (sample.position, own, trajectory.invalid)
                logger.warning("episode %d-%d is invalid, the first one for this reason: %s", *found)
        return replace(trajectory, metrics={**trajectory.metrics, "retries": float(retry)})

    async def _run(self, runner: EpisodeRunner, engine: RolloutEngine, sample: PromptSample, seed: int) -> Trajectory:
        """Run one episode, and end it when its time is over."""
        what = f"the environment {self.name!r} failed in the episode {sample.position}-{seed}"
        seconds = self.spec.limits.timeout_s
        running = asyncio.ensure_future(runner.run(engine, sample, seed))
        try:
            await asyncio.wait([running], timeout=seconds + GRACE_S)
        except asyncio.CancelledError:
            running.cancel()
            raise
        if not running.done():
            running.cancel()
            await asyncio.wait([running], timeout=GRACE_S)
            why = f"it did not end within rollout.environment.timeout_s={seconds:g}"
            return Trajectory((Segment(sample.prompt_tokens),), "abort", invalid=why)
        with boundary(what, EngineError):
            return self._checked(running.result(), what)

    def _checked(self, trajectory: Trajectory, what: str) -> Trajectory:
        """Return ``trajectory`` if it is one, with tokens, and no row of it is longer than a sequence may be."""
        if not isinstance(trajectory, Trajectory):
            raise EngineError(f"{what}: it returned a {type(trajectory).__name__}, not a Trajectory")
        sizes = [len(segment.tokens) for segment in trajectory.segments]
        lengths = [sum(sizes[index] for index in row) for row in trajectory.rows()]
        if not lengths or not all(lengths):
            raise EngineError(f"{what}: its trajectory has {'a row' if lengths else 'no row'} without tokens")
        longest = max(lengths)
        if longest > self.spec.limits.max_model_len:
            limit = self.spec.limits.max_model_len
            raise EngineError(f"{what}: its trajectory has a row of {longest} tokens, and {limit} are allowed")
        return trajectory


_reasons = Reasons()
_building = Lock()
_runners: WeakKeyDictionary[RolloutEngine, list[tuple[EnvironmentEpisode, EpisodeRunner]]] = WeakKeyDictionary()


def _runner(engine: RolloutEngine, episode: EnvironmentEpisode) -> EpisodeRunner:
    """Return the runner of ``episode`` next to ``engine``; build it the first time."""
    with _building:
        built = _runners.setdefault(engine, [])
        for other, runner in built:
            if other == episode:
                return runner
        built.append((episode, _opened(episode)))
        return built[-1][1]


def _opened(episode: EnvironmentEpisode) -> EpisodeRunner:
    plugin = plugins.get(EnvironmentRole.plugin_group, episode.name)
    with boundary(f"the environment {episode.name!r} cannot be opened", EngineError):
        runner = plugin.build(episode.spec)
    if not isinstance(runner, EpisodeRunner):
        raise EngineError(f"the environment {episode.name!r} made a {type(runner).__name__}, not an EpisodeRunner")
    return runner


def check_environment(episode: Episode) -> None:
    """Open and close the environment of ``episode``, if it has one, so that mistakes are found before models load.

    Raises:
        EngineError: it cannot be opened; or another `RlcoreError`.
    """
    if isinstance(episode, EnvironmentEpisode):
        _opened(episode).close()


def closing_runners(engine: RolloutEngine) -> RolloutEngine:
    """Let ``engine`` close the runners next to it before it closes itself; return it."""

    def close() -> None:
        del engine.close  # without it, engine and function would keep each other in memory
        close_runners(engine)
        engine.close()

    engine.close = close  # type: ignore[method-assign]
    return engine


def close_runners(engine: RolloutEngine) -> None:
    """Close the runners next to ``engine``. One that fails in it is logged: the run has what it wanted."""
    for episode, runner in _runners.pop(engine, []):
        try:
            runner.close()
        except Exception:
            logger.exception("the environment %r failed while it was closed", episode.name)


@atexit.register
def _close_all() -> None:
    """Close what a run left open that ended without closing its rollout."""
    for engine in list(_runners):
        close_runners(engine)
