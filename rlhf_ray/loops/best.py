"""The best policy of a run by a number of its held-out evaluation: a model folder beside the last one's."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.config.rewards import RewardSettings
from rlhf_ray.config.schema import EvalConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.loops.export import export
from rlhf_ray.roles.protocols import Learner
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.storage import opened, read_object, sealed, to_json, write_atomically


class BestPolicy:
    """Exports the learner's weights whenever `by`, of which more is better, has not been so high before.

    What it knows is in a file of the run directory, written after the folder that it describes. A resumed run repeats
    the steps after its checkpoint, and with them their evaluations: one that was the best is exported once more.
    Numbers of evaluations that measure something else (`measure_of`) are not compared: it then begins anew.
    """

    def __init__(
        self, by: str, learner: Learner, directory: RunDirectory, *, measure: str = "", lora: bool = False
    ) -> None:
        self.by = by
        self.measure = measure
        self.learner = learner
        self._directory = directory
        self.folder = directory.best_model
        self._adapter = directory.best_adapter if lora else None
        self._file = directory.best_file
        kept = _read(self._file) if directory.resumed else {}
        self.found: dict[str, Any] = {name: kept[name] for name in ("step", by) if by in kept and "step" in kept}
        if self.found and kept.get("measure", measure) != measure:
            reason = f"what eval measures has changed, so {by} {self.found[by]:g} of step {self.found['step']} is not"
            self._refuse("best_forgotten", self.found["step"], f"{reason} compared with what follows")
            self.found = {}

    def consider(self, step: int, result: Mapping[str, Any]) -> None:
        """`result`: an evaluation of the weights that the learner holds after `step` steps.

        Raises ConfigError if the first evaluation of a run has no such number. A later one may lack it, and is passed
        over: a function's mean is there where it judged something.
        """
        value = result.get(self.by)
        if not isinstance(value, float):
            numbers = ", ".join(name for name, number in result.items() if isinstance(number, float))
            reason = f"eval.best_by={self.by}: the evaluation has no such number; it has {numbers}"
            if not self.found:
                raise ConfigError(reason)
            reason += f". It is passed over, and the policy of step {self.found['step']} stays the best"
            self._refuse("not_compared", step, reason)
            return
        # A repeated step is exported again: what lies there may be of a run that was killed after it. NaN is no better.
        if value > self.found.get(self.by, float("-inf")) or step == self.found.get("step"):
            export(self.learner, self.folder, self._adapter, "the best model")
            self.found = {"step": step, self.by: value}
            write_atomically(self._file, to_json(sealed({**self.found, "measure": self.measure})) + "\n")

    def _refuse(self, kind: str, step: int, reason: str) -> None:
        self._directory.event(kind, step=step, reason=reason)
        warnings.warn(f"step {step}: {reason}", stacklevel=3)


def measure_of(evaluation: EvalConfig, judging: RewardSettings, max_new_tokens: int) -> str:
    """A digest of the settings that decide what a number of an evaluation means; its rows are fixed by other means."""
    parts = {
        "eval": (evaluation.size, evaluation.temperature, max_new_tokens),
        "rewards": [(r.name, r.function, r.weight, r.args, r.on_failure, r.default_score) for r in judging.functions],
        "models": [part and part.model_dump(mode="json") for part in (judging.model, judging.safety)],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    """{} where there is none yet, or a damaged one: the next evaluation writes it again."""
    return opened(read_object(file)) or {}
