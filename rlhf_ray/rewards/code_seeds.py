"""`random.seed(5)` in a test is meant for the sample, too, which draws in another process.

Only the seed is told, and only while the test itself has drawn nothing since: from a generator's later state one could
compute what a test has drawn, and that may be what it expects. Standard library only: `sandbox.py` passes this file's
code into the sandbox.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # `typing` itself takes longer to import than most samples to run
if TYPE_CHECKING:
    from typing import Any


class Seeds:
    """In the test's process."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[tuple, dict, Any]] = {}
        self._watched: set[str] = set()

    def watch(self, module_name: str) -> None:
        """From now on, remember what `random.seed` or `numpy.random.seed` is given."""
        if module_name in self._watched:
            return
        self._watched.add(module_name)
        module = importlib.import_module(module_name)
        seed = module.seed

        def remembered(*args: Any, **named: Any) -> None:
            seed(*args, **named)
            chosen = next(iter([*args, *named.values()]), None)
            if chosen is None:
                self._given.pop(module_name, None)  # from the system's own randomness
            else:
                self._given[module_name] = (args, named, _state(module))

        module.seed = remembered

    def take(self) -> dict[str, list]:
        """Of each module that was seeded since: the arguments. They are told once."""
        given, self._given = self._given, {}
        untouched = {name: _state(importlib.import_module(name)) == state for name, (_, _, state) in given.items()}
        return {name: [list(args), named] for name, (args, named, _) in given.items() if untouched[name]}


def sow(seeds: dict[str, list]) -> None:
    """In the sample's process."""
    for module_name, (args, named) in seeds.items():
        if module_name in ("random", "numpy.random"):
            importlib.import_module(module_name).seed(*args, **named)


def _state(module: Any) -> Any:
    if hasattr(module, "getstate"):
        return module.getstate()
    _, words, *rest = module.get_state()
    return words.tobytes(), rest
