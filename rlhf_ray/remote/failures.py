"""How an error travels from a worker to the driver, and of which class it is.

Errors are classified where they happen: this package's own keep their type, because the driver decides by it; all
others arrive with the worker's traceback as text, because they may not even unpickle: as LostError what another process
might be spared, as ForeignError what would fail there, too.
"""

from __future__ import annotations

import errno
import functools
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rlhf_ray.errors import EngineError, ForeignError, RlhfRayError, WorkerError

LOOK_THERE = (
    "its process, machine or network failed, not the work: look there (memory, devices, the kernel's log), then resume "
    "with --resume auto"
)

Method = TypeVar("Method", bound=Callable[..., Any])


class LostError(WorkerError):
    """Not the work failed but the process, the machine or the network under it: elsewhere the same call may succeed."""


class CutError(LostError):
    """A worker cannot be reached; it may be again."""


# Names of classes, so that nothing is imported to compare with; whatever inherits from one counts as well.
INFRASTRUCTURE = frozenset({
    "MemoryError", "ConnectionError", "TimeoutError",
    # torch: a peer of a collective, the store where ranks meet; a device that failed
    "torch.distributed.DistError", "torch.AcceleratorError",
    # Ray: processes, machines, objects that were lost with one, and its memory monitor, which ends processes
    "ray.exceptions.RayActorError", "ray.exceptions.NodeDiedError", "ray.exceptions.LocalRayletDiedError",
    "ray.exceptions.WorkerCrashedError", "ray.exceptions.ObjectLostError", "ray.exceptions.OutOfMemoryError",
    "ray.exceptions.ObjectStoreFullError", "ray.exceptions.OutOfDiskError", "ray.exceptions.RaySystemError",
    "ray.exceptions.RpcError",
})  # fmt: skip
INFRASTRUCTURE_ERRNOS = frozenset({
    errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
})  # fmt: skip
# Libraries in C++ have one class for everything, and say what it is in the text.
INFRASTRUCTURE_TEXTS = re.compile(
    r"CUDA error|CUDA driver error|CUDNN_STATUS_|CUBLAS_STATUS_|NCCL (error|WARN|communicator)|uncorrectable ECC"
    r"|can't allocate memory|Cannot allocate memory|std::bad_alloc"
    r"|Connection (closed by peer|reset by peer|refused)|Broken pipe|Socket closed"
)
# They look like the others, and come back with the same rows: a tensor that is too large, an index beyond a table.
WORK_TYPES = frozenset({"torch.OutOfMemoryError"})
WORK_TEXTS = re.compile(r"device-side assert|CUDA out of memory")


def is_infrastructure(error: BaseException) -> bool:
    """Whether another process, or this one at another time, might be spared `error`; by its explicit cause, if it has
    one."""
    names = {_full_name(kind) for kind in type(error).__mro__}
    text = str(error)
    if names & WORK_TYPES or WORK_TEXTS.search(text):
        return False
    if names & INFRASTRUCTURE or (isinstance(error, OSError) and error.errno in INFRASTRUCTURE_ERRNOS):
        return True
    if isinstance(error, RuntimeError) and INFRASTRUCTURE_TEXTS.search(text):
        return True
    return error.__cause__ is not None and is_infrastructure(error.__cause__)


def _full_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


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
    """`error` itself if it is this package's and survives pickling, else a LostError or ForeignError that quotes it.

    A dead engine is as lost as its process: another one can take its place.
    """
    dead = isinstance(error, EngineError)
    own = isinstance(error, RlhfRayError) and not dead
    if own and _survives(error):
        return error
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    kind, advice = ForeignError, ""
    if dead or not own and is_infrastructure(error):
        kind, advice = LostError, f"; {LOOK_THERE}"
    return kind(
        f"{where} failed: {type(error).__name__}: {error}{advice}\n--- traceback of the worker ---\n{text.rstrip()}"
    )


def _survives(error: RlhfRayError) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever a __reduce__ may do
        return False
