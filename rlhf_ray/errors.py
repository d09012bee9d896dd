"""Exceptions of this package.

Each one also inherits the fitting built-in exception, so that `except ValueError` works for people
who do not know these names. Every message says what is wrong, why, and what to do.
"""

from __future__ import annotations

# What a command's exit status says. A supervisor may start a command again after AGAIN, and after no other.
UNEXPECTED, CONFIG, DATA, DIVERGED, AGAIN, INTERRUPTED = 1, 2, 3, 4, 75, 130


class RlhfRayError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(RlhfRayError, ValueError):
    """The configuration is wrong or contradicts itself."""


class DataError(RlhfRayError, ValueError):
    """A data file or row is unusable; the message names file and line."""


class ModelError(RlhfRayError, ValueError):
    """A model or tokenizer cannot be loaded or does not fit its use."""


class RewardError(RlhfRayError, RuntimeError):
    """A reward function raised, or returned something that is not a reward."""


class RequestError(RlhfRayError, RuntimeError):
    """A generator's engine gave up some requests; the others go on. `sample_ids` names those that failed."""

    def __init__(self, message: str, sample_ids: tuple[int, ...] = ()) -> None:
        super().__init__(message, sample_ids)
        self.sample_ids = sample_ids

    def __str__(self) -> str:
        return self.args[0]


class EngineError(RlhfRayError, RuntimeError):
    """A generator's engine died, and what was being written in it is lost; that generator must be replaced."""


class StepError(RlhfRayError, RuntimeError):
    """`begin`, `learn` and `finish` of a learner or critic came in another order, or another call between them."""


class SyncError(RlhfRayError, RuntimeError):
    """Weights did not arrive whole in a generator; that generator must be replaced."""


class CheckpointError(RlhfRayError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another run."""


class PlacementError(RlhfRayError, RuntimeError):
    """The cluster cannot hold the roles."""


class WorkerError(RlhfRayError, RuntimeError):
    """A remote worker died or its call failed; the message names the worker."""


class ForeignError(WorkerError):
    """A worker's call raised something that is none of these errors, and would anywhere; the message quotes it."""


class RanksLostError(WorkerError):
    """Ranks that learn are lost, and others take their seats: the run goes back to its newest checkpoint, in place."""


class DeadlineError(RlhfRayError, TimeoutError):
    """A remote call did not return in time; the message names the worker and the call."""


class DivergenceError(RlhfRayError, ArithmeticError):
    """Training no longer has finite gradients, step after step."""


class StageError(RlhfRayError, RuntimeError):
    """A stage of a pipeline failed; the message names it, `status` is its exit status."""

    def __init__(self, message: str, status: int = UNEXPECTED) -> None:
        super().__init__(message)
        self.status = status


class Terminated(KeyboardInterrupt):
    """A scheduler's SIGTERM. The run ends as it does after Ctrl-C: it writes down how far it got."""


class StorageError(RlhfRayError, OSError):
    """The disk does not take our bytes: full, over quota, read-only or forbidden."""


# By the class of the error that ends a command, or the nearest one above it.
EXIT_STATUS: dict[type[BaseException], int] = {
    ConfigError: CONFIG,
    DataError: DATA,
    ModelError: DATA,
    RewardError: DATA,
    CheckpointError: DATA,
    StepError: UNEXPECTED,
    DivergenceError: DIVERGED,
    PlacementError: AGAIN,
    WorkerError: AGAIN,
    ForeignError: UNEXPECTED,
    RanksLostError: AGAIN,
    DeadlineError: AGAIN,
    EngineError: AGAIN,
    RequestError: AGAIN,
    SyncError: AGAIN,
    StorageError: AGAIN,
    KeyboardInterrupt: INTERRUPTED,
}


def exit_status(error: BaseException) -> int:
    """What a command that `error` has ended tells whoever started it. A failed stage's is the pipeline's, too."""
    if isinstance(error, StageError):
        return error.status
    return next((EXIT_STATUS[kind] for kind in type(error).__mro__ if kind in EXIT_STATUS), UNEXPECTED)
