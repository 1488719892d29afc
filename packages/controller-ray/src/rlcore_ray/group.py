"""A worker group on Ray: called as if it were one engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import ray

from rlcore.controller.dispatch import Dispatch, dispatch_of, first_argument, gather, is_lazy, partition_of_call, take
from rlcore_ray.answers import Asked
from rlcore_ray.calls import unpacked
from rlcore_ray.pool import Pool
from rlcore_ray.remote_batch import RemoteBatch

if TYPE_CHECKING:
    from rlcore_ray.executor import RayExecutor

INTERVENTIONS = ("update_weights", "pause", "resume", "abort")
"""Methods that act on an engine while it is at work."""


class RayGroup:
    """Forwards calls to the engines of ``role``, as declared on ``interface``.

    Methods that are declared to be lazy (`rlcore.controller.dispatch`) return at once. Given a `RemoteBatch`, one that
    is sharded returns a `RemoteBatch` that is still being made; whoever needs its columns waits for them. Other calls
    wait. For a `Batch` comes back a `Batch`.
    """

    def __init__(self, executor: RayExecutor, pool: Pool, role: str, interface: type, built: list[Asked]) -> None:
        self._executor = executor
        self._pool = pool
        self._role = role
        self._interface = interface
        self._built = built
        self._layout: tuple[list[int], int] | None = None

    def wait_built(self) -> None:
        """Wait until the engines are there.

        Raises:
            RlcoreError: why they are not.
        """
        if self._layout is None:
            answers = [head.value for head in self._executor.waiter.wait(self._built)]
            if self._pool.together:
                self._layout = [rank for rank, _ in answers], answers[0][1]
            else:  # every process is a replica
                self._layout = list(range(len(answers))), len(answers)

    @property
    def dp_size(self) -> int:
        self.wait_built()
        assert self._layout is not None
        return self._layout[1]

    def close(self) -> None:
        """Let the engines close what they opened. Nobody is waited for long: their processes are ended next, and one
        that hangs or is still starting must not keep the others, nor whoever pressed Ctrl-C."""
        work = partial(_method, self._role, "close")
        asked = [self._ask(rank, "engine", work, "close") for rank in range(len(self._pool.workers))]
        if asked:
            ray.wait([call.head for call in asked], num_returns=len(asked), timeout=self._executor.farewell_s())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        how = dispatch_of(self._interface, name)
        declared = inspect.getattr_static(self._interface, name, None)
        if declared is None and not any(
            name in getattr(base, "__annotations__", {}) for base in self._interface.__mro__
        ):
            raise AttributeError(f"{self._interface.__name__} has no {name!r}")
        if inspect.iscoroutinefunction(declared):
            raise NotImplementedError(f"{self._role}.{name} is asynchronous; call it through the executor's `one`")
        if how is None and not callable(declared):
            return self._everywhere(_attribute, name, only_first=True)
        unbound = getattr(self._interface, name)
        method = partial(unbound, None)

        @wraps(unbound)
        def spread(*args: Any, **kwargs: Any) -> Any:
            if how is Dispatch.SHARD:
                return self._shard(name, method, args, kwargs)
            if how is Dispatch.STREAM:
                raise NotImplementedError(f"{self._role}.{name} yields in the workers; use RayExecutor.apply")
            return self._everywhere(_method, name, *args, only_first=how is not Dispatch.BROADCAST, **kwargs)

        return spread

    def _everywhere(self, work: Callable[..., Any], name: str, *args: Any, only_first: bool, **kwargs: Any) -> Any:
        """Do it in all processes, or in the first; the first one's result."""
        lane = "control" if name in INTERVENTIONS else "engine"
        ranks = [0] if only_first else range(len(self._pool))

        def ask(rank: int) -> Asked:
            return self._ask(rank, lane, partial(work, self._role, name), name, args, kwargs)

        if self._pool.together:
            asked = [ask(rank) for rank in ranks]
            if is_lazy(self._interface, name):
                self._executor.waiter.later(asked)
                return None
            return unpacked(self._executor.waiter.wait(asked)[0].value, asked[0].body)
        return self._from_replicas(ranks, ask)

    def _from_replicas(self, ranks: Sequence[int], ask: Callable[[int], Asked]) -> Any:
        """Ask all of ``ranks``, and those that take the place of dead ones; the first one's result."""
        waiter, results, missing = self._executor.waiter, dict[int, Any](), list(ranks)
        while missing:
            asked = [ask(rank) for rank in missing]
            for call, answer in zip(asked, waiter.collect(asked)):
                if isinstance(answer, Exception):
                    self._executor.replace(self._pool, call.rank, call.worker, call.title, answer)
                elif answer.failure is not None:
                    waiter.fail(call.title, answer.failure)
                else:
                    results[call.rank] = unpacked(answer.value, call.body)
            missing = [rank for rank in missing if rank not in results]
        return results[ranks[0]]

    def _shard(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.wait_built()
        assert self._layout is not None
        dp_ranks, dp_size = self._layout
        argument, _ = first_argument(method, args, kwargs)
        parts = partition_of_call(self._interface, name, args, kwargs, argument, dp_size)
        work = partial(_method, self._role, name)
        asked = []
        for rank, dp_rank in enumerate(dp_ranks):
            own_args, own_kwargs = _with_first(method, args, kwargs, take(argument, parts[dp_rank]))
            asked.append(self._ask(rank, "engine", work, name, own_args, own_kwargs))
        answering = [dp_ranks.index(dp_rank) for dp_rank in range(dp_size)]  # of ranks that share a part, the lowest
        here = not isinstance(argument, RemoteBatch)
        if is_lazy(self._interface, name) and not here:
            self._executor.waiter.later(asked)
            return RemoteBatch.being_made([asked[rank].body for rank in answering], parts, argument.lengths)
        heads = self._executor.waiter.wait(asked)
        results = [unpacked(heads[rank].value, asked[rank].body) for rank in answering]
        return gather([r.fetch() if here and isinstance(r, RemoteBatch) else r for r in results], parts)

    def _ask(
        self,
        rank: int,
        lane: str,
        work: Callable[..., Any],
        name: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Asked:
        return self._executor.ask(self._pool, rank, lane, f"{self._role}.{name}", work, args, dict(kwargs or {}))


def _method(role: str, name: str, engines: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    return getattr(engines[role], name)(*args, **kwargs)


def _attribute(role: str, name: str, engines: Mapping[str, Any]) -> Any:
    return getattr(engines[role], name)


def _with_first(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], part: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (part, *args[1:]), dict(kwargs)
    return (), {**kwargs, next(iter(inspect.signature(method).parameters)): part}
