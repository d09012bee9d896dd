"""What both fuzzers need: cases that cover each other's features, and bounds on the time and memory of one case."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

CPU_SECONDS = 20.0  # of one case: a net for what would never end, no measure of speed
MEMORY = 1 << 30  # bytes that one case may ask for


class Hang(BaseException):
    """A case took more than CPU_SECONDS. No Exception: nothing may catch it as the fault of a row."""


@dataclass(frozen=True)
class Case:
    """Number `number` of its kind; everything in it follows from the number and the names."""

    kind: str
    number: int
    seed: str
    form: str  # how it is written: a file format, a command
    mutations: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}-{self.number} ({self.seed}, {self.form}: {'; '.join(self.mutations)})"

    @property
    def random(self) -> Random:
        """A generator of its own: cases do not depend on each other."""
        return Random(f"{self.kind}/{self.number}/{self.seed}/{self.form}/{self.mutations}")


def make_cases(
    kind: str, count: int, seeds: Sequence[str], forms: Sequence[str], mutations: Sequence[str]
) -> list[Case]:
    """`count` cases in which each mutation, seed and form comes as often as any other; a third have two mutations."""
    columns = [_repeated(names, count, f"{kind}/{column}") for column, names in
               enumerate((seeds, forms, mutations, mutations))]  # fmt: skip
    return [
        Case(kind, number, seed, form, (first, second) if number % 3 == 2 else (first,))
        for number, (seed, form, first, second) in enumerate(zip(*columns, strict=True))
    ]


def _repeated(names: Sequence[str], count: int, salt: str) -> list[str]:
    """All names in an order of their own, again and again."""
    random, result = Random(salt), []
    while len(result) < count:
        result += random.sample(list(names), len(names))
    return result[:count]


def covering(cases: Sequence[Case], count: int) -> list[Case]:
    """The `count` cases that together show most: first every feature, then pairs of features, always the next best."""
    chosen: list[Case] = []
    seen: set[tuple[str, ...]] = set()
    left = {case.number: _features(case) for case in cases}
    for _ in range(count):
        best = max(left, key=lambda number: (sum(10 ** (2 - len(f)) for f in left[number] if f not in seen), -number))
        seen |= left.pop(best)
        chosen.append(cases[best])
    return sorted(chosen, key=lambda case: case.number)


def _features(case: Case) -> set[tuple[str, ...]]:
    singles = [f"seed {case.seed}", f"form {case.form}", *(f"mutation {name}" for name in case.mutations)]
    return {(single,) for single in singles} | set(combinations(singles, 2))


@contextmanager
def bounded() -> Iterator[None]:
    """Raises Hang or MemoryError in a case that would take the machine with it.

    CPU time, not the clock's: on a busy machine nothing fails for waiting, and pytest-timeout keeps its own alarm.
    """

    def hang(*_: object) -> None:
        raise Hang(f"more than {CPU_SECONDS:g} s of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    if (used := _address_space()) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def _address_space() -> int | None:
    """Bytes of this process; None where the kernel does not say (macOS, which does not keep the limit either)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None


@contextmanager
def roomy() -> Iterator[None]:
    """Python's own limits are lifted, so that a writer of cases can write what a reader must refuse."""
    depth, digits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    sys.setrecursionlimit(20_000)
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.setrecursionlimit(depth)
        sys.set_int_max_str_digits(digits)
