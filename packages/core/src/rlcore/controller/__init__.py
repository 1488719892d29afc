"""The single controller: worker groups that are called as if they were one engine."""

from rlcore.controller.dispatch import Dispatch, dispatch
from rlcore.controller.local import LocalExecutor

__all__ = ["Dispatch", "LocalExecutor", "dispatch"]
