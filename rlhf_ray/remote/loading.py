"""What a run says while its workers start: who is being loaded, who is ready, and who is waited for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence

from rlhf_ray.remote.calls import Call, Worker

Note = Callable[[str], None]


def silent(line: str) -> None:
    """The `note` of those who want no lines."""


class Loading:
    """A line at the start and whenever all workers of a role are ready; nothing in between.

    Args:
        note: takes a line.
        workers: all that will be built.
        engines: role -> what it runs on, for people ("vllm").
    """

    def __init__(
        self, note: Note, workers: Sequence[Worker], engines: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._note, self._clock, self._began = note, clock, clock()
        self._waiting: dict[str, set[str]] = {}
        for worker in workers:
            self._waiting.setdefault(_role(worker), set()).add(worker.name)
        self._titles = {role: title(sorted(names), engines.get(role)) for role, names in self._waiting.items()}
        note(f"loading {', '.join(self._titles.values())}")

    def done(self, call: Call) -> None:
        """A call that builds a role has returned."""
        role = _role(call.worker)
        names = self._waiting.get(role, set())
        names.discard(call.worker.name)
        if names or self._waiting.pop(role, None) is None:
            return
        line = f"{self._titles[role]} ready in {self._clock() - self._began:.0f} s"
        if self._waiting:
            line += f"; waiting for {', '.join(self._titles[role] for role in self._waiting)}"
        self._note(line)


def title(names: Sequence[str], engine: str | None) -> str:
    """`generator 0 (vllm)`; of several `generator 0-3 (vllm)`, `reference 0-1 rank 0-3`."""
    numbers = iter(zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True))

    def span(found: re.Match[str]) -> str:
        own = next(numbers)
        return f"{min(own)}-{max(own)}" if max(own) > min(own) else found[0]

    text = re.sub(r"\d+", span, names[0])
    return f"{text} ({engine})" if engine else text


def _role(worker: Worker) -> str:
    return worker.name.split()[0]
