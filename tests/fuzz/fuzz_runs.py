"""Run directories with a damaged file, and what resuming them must do: go on as if nothing had happened, or say so and
take the checkpoint before. Nothing is trained."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

from fuzz_harness import Case, make_cases

from rlhf_ray.commands.summary import print_summary
from rlhf_ray.config.load import validated
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.loops.best import BestPolicy
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.resume import frozen_clock
from rlhf_ray.run.training_run import TrainingRun

STEPS = (2, 4)  # with a checkpoint
OF_CHECKPOINTS = ("manifest.json", "state.pt", "beginning.json", "learner/engine.json",
                  "learner/rank_0.safetensors")  # fmt: skip
SIDE_FILES = (
    "config.yaml", "data.json", "summary.json", "before.json", "best.json", "metrics.jsonl", "events.jsonl",
    "rollouts/step_3.jsonl", "checkpoints/latest", ".lock",
)  # fmt: skip
# Checkpoints as often as everything else together.
TARGETS = (*(f"checkpoints/step_4/{name}" for name in OF_CHECKPOINTS * 2), "checkpoints/step_2/manifest.json",
           "checkpoints/step_2/learner/rank_0.safetensors", *SIDE_FILES)  # fmt: skip


def flip(data: bytes, random: Random) -> bytes:
    if not data:
        return data
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]


MUTATIONS: dict[str, Callable[[bytes, Random], bytes | None]] = {
    "one bit": flip,
    "another bit": flip,
    "a digit": lambda data, random: _at_a_digit(data, random),
    "cut": lambda data, random: data[: random.randrange(len(data) or 1)],
    "last byte gone": lambda data, random: data[:-1],
    "empty": lambda data, random: b"",
    "zeros": lambda data, random: bytes(len(data)),
    "zeros at the end": lambda data, random: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "noise": lambda data, random: random.randbytes(200),
    "no UTF-8": lambda data, random: b"\xff\xfe" + data,
    "other JSON": lambda data, random: random.choice([b"[]\n", b"null", b"{}", b'"x"', b"3", b'{"step": "x"}\n']),
    "deep JSON": lambda data, random: b"[" * 100_000,
    "no files": lambda data, random: data.replace(b'"files": {', b'"files": {}, "_": {'),
    "twice": lambda data, random: data + data,
    "gone": lambda data, random: None,
}


def _at_a_digit(data: bytes, random: Random) -> bytes:
    places = [place for place, byte in enumerate(data) if chr(byte).isdecimal()]
    if not places:
        return flip(data, random)
    place = random.choice(places)
    other = (data[place] - ord("0") + random.randrange(1, 10)) % 10 + ord("0")
    return data[:place] + bytes([other]) + data[place + 1 :]


def run_cases(count: int) -> list[Case]:
    return make_cases("run", count, TARGETS, ("resume",), tuple(MUTATIONS))


def damage(run: Path, case: Case) -> None:
    """The case's file, and with a second mutation one more of the side files."""
    random = case.random
    for target, mutation in zip((case.seed, random.choice(SIDE_FILES)), case.mutations, strict=False):
        path = run / target
        damaged = MUTATIONS[mutation](path.read_bytes() if path.exists() else b"", random)
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)


class Checked:
    """A run of four steps that has ended, and what must be true of every damaged copy of it."""

    def __init__(self, run: Path, config: RunConfig) -> None:
        self.run = run
        self.config = config
        self.data = json.loads((run / "data.json").read_text())
        self.measure = json.loads((run / "best.json").read_text())["measure"]
        self.before = json.loads((run / "before.json").read_text())["reward"]

    def __call__(self, case: Case, folder: Path) -> str:
        run = folder / "run"
        shutil.copytree(self.run, run)
        damage(run, case)
        latest = run / "checkpoints" / "latest"
        pointed = latest.exists() and latest.read_bytes().strip() == b"step_2"  # as if somebody had edited it
        with warnings.catch_warnings(record=True) as said, redirect_stdout(StringIO()):
            warnings.simplefilter("always")
            found = self._resume(run)
        told = {event["checkpoint"] for event in found["events"] if event["event"] == "checkpoint_damaged"}
        step = found["step"]
        if told:
            assert "; falling back to the one before it" in str(said[0].message)
        assert step == STEPS[-1] or (step == STEPS[0] and (pointed or told == {"step_4"})), (step, told)
        for path in (self.run / "checkpoints" / f"step_{step}").rglob("*"):
            if path.is_file() and path.name != "manifest.json":  # of which a last newline may be gone
                assert path.read_bytes() == (run / path.relative_to(self.run)).read_bytes(), path
        assert found["before"]["reward"] == self.before, found["before"]
        return "detected" if told else "harmless"

    def _resume(self, path: Path) -> dict[str, Any]:
        """What `run_rl` does before it trains, and what it does at its end."""
        directory = RunDirectory(path, resume=True)
        config = frozen_clock(validated(self.config), directory)
        run = TrainingRun(config, directory, self.data)
        assert run.resume_point is not None
        before = run.remember("before", lambda: {"reward": "measured anew"})
        best = BestPolicy("reward", None, directory, measure=self.measure)
        assert best.found in ({}, {"step": best.found.get("step"), "reward": best.found.get("reward")})
        run.finish("finished", before=dict(before), after={"reward": 1.0, "samples": before["samples"]})
        print_summary(directory.read_summary(), writes=True)
        return {"step": run.resume_point.step, "before": before, "events": directory.read_events()}
