"""How an error travels from a worker to the driver.

Errors are classified where they happen: this package's own keep their type, because the driver decides by it;
all others arrive as WorkerError with the worker's traceback as text, because they may not even unpickle.
"""

from __future__ import annotations

import functools
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rlhf_ray.errors import RlhfRayError, WorkerError

Method = TypeVar("Method", bound=Callable[..., Any])


class ForeignError(WorkerError):
    """A worker's call raised something that is none of this package's errors."""


def reported(method: Method) -> Method:
    """For methods of actors: whatever they raise can travel, and says where it comes from.

    Stands above `ray.method`, whose options Ray reads from the innermost function.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with reporting(f"{self.name}: {method.__name__}"):
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


@contextmanager
def reporting(where: str) -> Iterator[None]:
    """Whatever is raised inside can travel, and says where it comes from."""
    try:
        yield
    except Exception as error:
        raise portable(error, where) from None


def portable(error: Exception, where: str) -> RlhfRayError:
    """`error` itself if it is this package's and survives pickling, else a ForeignError that quotes it."""
    if isinstance(error, RlhfRayError) and _survives(error):
        return error
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return ForeignError(
        f"{where} failed: {type(error).__name__}: {error}\n--- traceback of the worker ---\n{text.rstrip()}"
    )


def _survives(error: RlhfRayError) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever a __reduce__ may do
        return False
