"""What a call from Python returns: the numbers of a run as rows, its samples, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DataError
from rlhf_ray.run.storage import read_lines

Row = dict[str, Any]


@dataclass(frozen=True, repr=False)
class Result:
    """A finished training run.

    Attributes:
        run_dir: the folder that holds everything the run has left (docs/runs.md).
        summary: what its summary.json says: status, steps, seconds, and the evaluation `before` and `after`.
    """

    run_dir: Path
    summary: Mapping[str, Any]

    @property
    def metrics(self) -> list[Row]:
        """A row for each step, `step` from 1 on; what the numbers mean: docs/metrics.md. A table of them is
        `pandas.DataFrame(result.metrics)`."""
        rows = read_lines(self.run_dir / "metrics.jsonl")
        # In the file NaN is a text.
        return [{name: float(x) if isinstance(x, str) else x for name, x in row.items()} for row in rows]

    @property
    def events(self) -> list[Row]:
        """What happened beside the steps: alarms, rewards that failed, checkpoints."""
        return read_lines(self.run_dir / "events.jsonl")

    @property
    def samples(self) -> list[Row]:
        """Held-out prompts, each with the answer `before` and `after`, and what rewards gave them: `reward_before`,
        `reward_after`. Empty where the model writes nothing (a reward model)."""
        both = [self.summary.get(when, {}).get("samples", []) for when in ("before", "after")]
        rows = []
        for old, new in zip(*both, strict=True):
            row = {"prompt": old["prompt"], "before": old["completion"], "after": new["completion"]}
            rewards = {"reward_before": old.get("reward"), "reward_after": new.get("reward")}
            rows.append({**row, **{name: reward for name, reward in rewards.items() if reward is not None}})
        return rows

    def rollouts(self, step: int) -> list[Row]:
        """Completions of one step of `rl`, with their rewards: the first `logging.rollouts` of them.

        Raises:
            DataError: none of this step were kept.
        """
        path = self.run_dir / "rollouts" / f"step_{step}.jsonl"
        if not path.is_file():
            raise DataError(f"{path}: no completions of step {step} were kept; logging.rollouts says how many are")
        return read_lines(path)

    @property
    def model(self) -> Path:
        """The trained model and its tokenizer, a Hugging Face folder; a LoRA adapter is merged into it."""
        return self.run_dir / "model"

    @property
    def adapter(self) -> Path | None:
        """The LoRA adapter by itself, where there is one."""
        return self._folder("adapter")

    @property
    def best_model(self) -> Path | None:
        """The policy that was best by `eval.best_by`, where that is set."""
        return self._folder("best_model")

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are kept, oldest first."""
        found = (self.run_dir / "checkpoints").glob("step_*")
        whole = [path for path in found if path.name.removeprefix("step_").isdecimal()]
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))

    def _folder(self, name: str) -> Path | None:
        folder = self.run_dir / name
        return folder if folder.is_dir() else None

    def __repr__(self) -> str:
        before, after = (self.summary.get(when, {}) for when in ("before", "after"))
        moved = [
            f"{name} {before[name]:.3f} -> {after[name]:.3f}"
            for name in ("reward", "accuracy", "val/loss", "val/accuracy") if name in before and name in after
        ]  # fmt: skip
        said = [f"{self.summary['steps']} steps in {self.summary['seconds']:.0f} s", *moved, str(self.run_dir)]
        return f"<{type(self).__name__}: {'; '.join(said)}>"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Models compared on the same prompts.

    Attributes:
        run_dir: the folder that holds everything the comparison has left.
        summary: what its eval.json says (docs/evaluation.md).
    """

    run_dir: Path
    summary: Mapping[str, Any]

    @property
    def metrics(self) -> list[Row]:
        """A row for each model: `model`, `path`, and its numbers."""
        models = self.summary["models"].items()
        return [{"model": name, "path": model["path"], **model["metrics"]} for name, model in models]

    @property
    def samples(self) -> list[Row]:
        """The first prompts, with the models' answers side by side."""
        return list(self.summary.get("samples", []))

    def answers(self, model: str) -> list[Row]:
        """All answers of one model, with their rewards. Raises DataError for a name that is none of the models."""
        path = self.run_dir / "answers" / f"{model}.jsonl"
        if not path.is_file():
            raise DataError(f"no model is called {model!r} here; there are {', '.join(self.summary['models'])}")
        return read_lines(path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {', '.join(self.summary['models'])}; {self.run_dir}>"
