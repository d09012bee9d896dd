"""A process writes what it holds of a network: at once, or from a copy in a thread while the next step runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from rlhf_ray.models.written import Written


class Saving:
    """`write()` on its way; what it raises comes with `result`."""

    def __init__(self, write: Callable[[], Written], background: bool) -> None:
        self._future: Future[Written] = Future()
        if background:
            # A daemon: a process that ends leaves a checkpoint without a manifest, which nobody takes for one.
            threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True).start()
        else:
            self._run(write)

    def _run(self, write: Callable[[], Written]) -> None:
        try:
            self._future.set_result(write())
        except Exception as error:
            self._future.set_exception(error)

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        """Until it has ended, in whichever way."""
        self._future.exception()

    def result(self) -> Written:
        """Waits. Raises what `write` has raised."""
        return self._future.result()
