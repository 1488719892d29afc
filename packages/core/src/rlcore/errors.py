"""Errors that are the user's to act on.

Each message says what is wrong, where, and what to do. The command line prints them without a traceback; any other
exception is a bug of ours and keeps its traceback.
"""


class RlcoreError(Exception):
    """Base class of every error below."""


class ConfigError(RlcoreError):
    """The configuration is invalid; the message lists every problem found, one per line."""


class DataError(RlcoreError):
    """A data file is missing, malformed, or does not hold what the configuration says."""


class BatchError(RlcoreError, ValueError):
    """Columns of a `Batch` do not fit together; the message names the column and both shapes."""


class PluginError(RlcoreError):
    """A plugin is unknown, cannot be imported, or was written for another interface version."""


class EngineError(RlcoreError):
    """A training or rollout engine cannot do what it was asked to."""


class TrainingError(RlcoreError):
    """A run goes on without learning anything: its rewards fail, or its updates are skipped."""


class CheckpointError(RlcoreError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class PlacementError(RlcoreError):
    """The processes that the configuration asks for do not fit into the cluster."""


class RestartsExhausted(RlcoreError):
    """A worker died after as many restarts as the configuration allows; the message says how to continue."""


class RlcoreWarning(UserWarning):
    """Something the user should know of while the run goes on. The command line prints the message alone."""


class WorkerError(Exception):
    """A rank or worker failed, hangs, or is out of step; the message names it and holds its traceback.

    Not an `RlcoreError`: what went wrong in the worker was not the user's to act on.
    """


class WorkerDied(WorkerError):
    """A worker process is gone, or the node that it ran on; what it held is lost."""
