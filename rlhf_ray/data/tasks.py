"""Built-in tasks, reached by a data path such as `task:arithmetic`. They need no file and no download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_ray.errors import DataError

_PREFIX = "task:"


@dataclass(frozen=True)
class Pair:
    """A prompt, the completion a supervised warm start learns, and the columns its reward reads."""

    prompt: str
    completion: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Disjoint train and test problems, and the characters that their texts are made of."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    alphabet: str

    def split(self, name: str) -> tuple[Pair, ...]:
        if name not in ("train", "test"):
            raise DataError(f"task:{self.name} has no split {name!r}; choose train or test")
        return self.train if name == "train" else self.test


def is_task(source: str) -> bool:
    return source.startswith(_PREFIX)


def load_task(source: str) -> Task:
    """The task behind `task:<name>`; always the same problems in the same split."""
    name = source.removeprefix(_PREFIX)
    if name not in _TASKS:
        raise DataError(f"{source}: no such built-in task; choose one of {', '.join(_PREFIX + n for n in _TASKS)}")
    return _TASKS[name]()


def supervised_pairs(source: str, *, split: str = "train") -> tuple[Pair, ...]:
    """(prompt, completion) pairs for a supervised warm start; EOS is the trainer's to add."""
    return load_task(source).split(split)


def arithmetic(held_out: int = 500, seed: int = 0) -> Task:
    """Addition of two two-digit numbers: "37+85=" -> "122". 8,100 problems, `held_out` of them for testing.

    The order of the problems, and with it the split, is a pure function of `seed`.
    """
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    order = sorted(problems, key=lambda ab: hashlib.blake2b(f"{seed}/{ab}".encode(), digest_size=16).digest())
    pairs = tuple(Pair(f"{a}+{b}=", str(a + b), {"answer": str(a + b)}) for a, b in order)
    return Task("arithmetic", train=pairs[held_out:], test=pairs[:held_out], alphabet="0123456789+=")


_TASKS: dict[str, Callable[[], Task]] = {"arithmetic": arithmetic}
