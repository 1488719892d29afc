"""`RoleWorkers`: the processes of one role, called as if they were one engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple, cast

import ray

from rlcore.controller.dispatch import Dispatch, dispatch_of, first_argument, gather, is_lazy, partition_of_call, take
from rlcore_ray.answers import PendingCall
from rlcore_ray.calls import Engines, unpacked
from rlcore_ray.pool import Pool
from rlcore_ray.remote_batch import RemoteBatch
from rlcore_ray.workers import Workers

INTERVENTIONS = ("update_weights", "pause", "resume", "abort")
"""Methods that act on an engine while another method is running."""


class Role(NamedTuple):
    """A role, and the pool that it runs on."""

    pool: Pool
    name: str


class RoleWorkers:
    """Forwards calls to the engines of ``role``, as declared on ``interface``.

    Methods that are declared as lazy (`rlcore.controller.dispatch`) return immediately. A lazy sharded method that is
    given a `RemoteBatch` returns a `RemoteBatch` whose columns are still being computed; reading the columns waits for
    them. Other calls wait. A method that is given a `Batch` returns a `Batch`.
    """

    def __init__(self, workers: Workers, role: Role, interface: type, built: list[PendingCall]) -> None:
        self._workers = workers
        self._role = role
        self._interface = interface
        self._built = built
        self._layout: tuple[list[int], int] | None = None  # data-parallel rank of every process, and their number

    def wait_built(self) -> None:
        """Wait until the engines are built.

        Raises:
            RlcoreError: why an engine cannot be built.
        """
        if self._layout is None:
            answers = [response.value for response in self._workers.waiter.wait(self._built)]
            if self._role.pool.one_world:
                self._layout = [rank for rank, _ in answers], answers[0][1]
            else:  # every process is a replica
                self._layout = list(range(len(answers))), len(answers)

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, or of replicas."""
        self.wait_built()
        assert self._layout is not None
        return self._layout[1]

    def close(self) -> None:
        """Let the engines close what they opened, within `Workers.close_timeout_s`.

        The processes are ended next anyway: one that hangs or is still starting must not delay the others or Ctrl-C.
        """
        work = partial(_method, self._role.name, "close")
        calls = [self._call(rank, "engine", work, "close") for rank in range(len(self._role.pool.workers))]
        if calls:
            timeout_s = self._workers.close_timeout_s()
            ray.wait([call.response for call in calls], num_returns=len(calls), timeout=timeout_s)

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
            raise NotImplementedError(f"{self._role.name}.{name} is asynchronous; call it through Executor.submit")
        if how is None and not callable(declared):
            return self._everywhere(_attribute, name, only_first=True)
        unbound = getattr(self._interface, name)
        method = partial(unbound, None)

        @wraps(unbound)
        def spread(*args: Any, **kwargs: Any) -> Any:
            if how is Dispatch.SHARD:
                return self._shard(name, method, args, kwargs)
            if how is Dispatch.STREAM:
                raise NotImplementedError(f"{self._role.name}.{name} yields in the workers; use Executor.apply")
            return self._everywhere(_method, name, *args, only_first=how is None, **kwargs)

        return spread

    def _everywhere(self, work: Callable[..., Any], name: str, *args: Any, only_first: bool, **kwargs: Any) -> Any:
        """Call all processes, or the first; return the first one's result."""
        concurrency_group = "control" if name in INTERVENTIONS else "engine"
        ranks = [0] if only_first else range(len(self._role.pool))

        def call(rank: int) -> PendingCall:
            return self._call(rank, concurrency_group, partial(work, self._role.name, name), name, args, kwargs)

        if not self._role.pool.one_world:
            return self._from_replicas(ranks, call)
        calls = [call(rank) for rank in ranks]
        if is_lazy(self._interface, name):
            self._workers.waiter.defer(calls)
            return None
        return unpacked(self._workers.waiter.wait(calls)[0].value, calls[0].body)

    def _from_replicas(self, ranks: Sequence[int], call: Callable[[int], PendingCall]) -> Any:
        """Call all ``ranks``, and the replacements of those that die; return the first one's result."""
        waiter, results, missing = self._workers.waiter, dict[int, Any](), list(ranks)
        while missing:
            calls = [call(rank) for rank in missing]
            for made, response in zip(calls, waiter.collect(calls)):
                if isinstance(response, Exception):
                    self._workers.replace(made, response)
                elif response.failure is not None:
                    waiter.fail(made.title, response.failure)
                else:
                    results[made.rank] = unpacked(response.value, made.body)
            missing = [rank for rank in missing if rank not in results]
        return results[ranks[0]]

    def _shard(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.wait_built()
        assert self._layout is not None
        dp_ranks, dp_size = self._layout
        argument, _ = first_argument(method, args, kwargs)
        parts = partition_of_call(self._interface, name, args, kwargs, argument, dp_size)
        work = partial(_method, self._role.name, name)
        calls = []
        for rank, dp_rank in enumerate(dp_ranks):
            own_args, own_kwargs = _with_first(method, args, kwargs, take(argument, parts[dp_rank]))
            calls.append(self._call(rank, "engine", work, name, own_args, own_kwargs))
        answering = [dp_ranks.index(dp_rank) for dp_rank in range(dp_size)]  # of ranks that share a part, the lowest
        by_reference = isinstance(argument, RemoteBatch)
        if is_lazy(self._interface, name) and by_reference:
            self._workers.waiter.defer(calls)
            return RemoteBatch.pending([calls[rank].body for rank in answering], parts, argument.lengths)
        responses = self._workers.waiter.wait(calls)
        results = [unpacked(responses[rank].value, calls[rank].body) for rank in answering]
        return gather([r if by_reference or not isinstance(r, RemoteBatch) else r.fetch() for r in results], parts)

    def _call(
        self,
        rank: int,
        concurrency_group: str,
        work: Callable[..., Any],
        name: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> PendingCall:
        pool, role = self._role
        return self._workers.call(pool, rank, concurrency_group, f"{role}.{name}", work, args, kwargs)


def role_of(workers: Any) -> Role:
    """Return the role that ``workers`` (what `RayExecutor.build` returned) belong to."""
    return cast(RoleWorkers, workers)._role


def _method(role: str, name: str, engines: Engines, *args: Any, **kwargs: Any) -> Any:
    return getattr(engines[role], name)(*args, **kwargs)


def _attribute(role: str, name: str, engines: Engines) -> Any:
    return getattr(engines[role], name)


def _with_first(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], part: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with ``part`` in the place of the first argument."""
    if args:
        return (part, *args[1:]), dict(kwargs)
    return (), {**kwargs, next(iter(inspect.signature(method).parameters)): part}
