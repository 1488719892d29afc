"""The single controller: the workers of a role are called as if they were one engine."""

from rlcore.controller.dispatch import Dispatch, dispatch
from rlcore.controller.executor import Event, Executor
from rlcore.controller.local import LocalExecutor
from rlcore.controller.pending import Done, Pending

__all__ = ["Dispatch", "Done", "Event", "Executor", "LocalExecutor", "Pending", "dispatch"]
