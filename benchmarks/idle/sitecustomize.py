"""Roles that do nothing, and a watch on the driver, for `benchmarks/driver.py`.

Python imports a module of this name when it starts, so with this folder on PYTHONPATH every process of a run finds
these roles in the place of its own, Ray's workers too, and everything else is the product's. The process that runs the
loop writes what each step has cost it to $DRIVER_OUT, one JSON object a line; with $DRIVER_PROFILE it runs under
cProfile from the second step on, and writes what that found there.
"""

from __future__ import annotations

import atexit
import cProfile
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

OUT, PROFILE = os.environ.get("DRIVER_OUT"), os.environ.get("DRIVER_PROFILE")
CHECKOUT = os.environ.get("DRIVER_CHECKOUT", "")


# ---- roles ------------------------------------------------------------------------------------------------------


def found(name: str) -> Any:
    """A module of the roles, which once stood on the top floor."""
    inside = importlib.util.find_spec(f"rlhf_ray.roles.{name}")
    return importlib.import_module(f"rlhf_ray.roles.{name}" if inside else f"rlhf_ray.{name}")


class Idle:
    """Whatever else it is asked: nothing happens."""

    version = 0

    def __init__(self, *made_of: Any) -> None:
        self.waiting: list[Any] = []
        self.asked: list[Any] = []  # requests that nobody has answered yet
        self.ranks = next((part.world_size for part in made_of if type(part).__name__ == "Rank"), 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **named: {}

    @property
    def division(self) -> Any:
        from rlhf_ray.roles.division import Division

        return Division(minibatches=1, max_tokens=16_384, seed=0, ranks=self.ranks)

    @property
    def engine(self) -> Any:
        return Idle()

    @property
    def sender(self) -> Any:
        return Idle()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def export_model(self, folder: Path) -> None:
        self.save(folder)
        (folder / "nothing").touch()

    def generate(self, requests: Any, sampling: Any) -> Any:
        """Answers of 8 to 63 tokens that say nothing."""
        build_batch = found("batch").build_batch
        answers = [(2,) * (8 + request.seed % 56) for request in requests]
        logprobs = [(-1.0,) * len(answer) for answer in answers]
        return build_batch(requests, answers, logprobs, truncated=[False] * len(answers), weight_version=0)

    @property
    def open(self) -> int:
        return len(self.waiting)

    def submit(self, requests: Any, sampling: Any) -> None:
        self.waiting += requests

    def collect(self) -> list[Any]:
        """As `generate`, of some requests at a time."""
        from rlhf_ray.sample import Sample

        ended, self.waiting = self.waiting[:16], self.waiting[16:]
        answers = [(2,) * (8 + request.seed % 56) for request in ended]
        return [
            Sample.answer(r.prompt_id, r.sample_id, r.token_ids, answer, (-1.0,) * len(answer), 0, "stop")
            for r, answer in zip(ended, answers, strict=True)
        ]

    def score(self, batch: Any, texts: int = 0, first: int = 0) -> Any:
        from rlhf_ray.roles.protocols import Scores

        score_B = (batch.response_mask.sum(1) % 3).float()
        return Scores(score_B, {"own": score_B}, (("?", "!"),) * texts, completion_ids=((2,),) * texts)

    def logprobs(self, batch: Any) -> Any:
        import torch

        return torch.zeros(batch.tokens.shape)


# ---- the driver -------------------------------------------------------------------------------------------------


def of_other_threads() -> float:
    """CPU seconds of this process's threads that run no Python: Ray's own."""
    python = {str(thread.native_id) for thread in threading.enumerate()}
    seconds = 0.0
    for thread in os.listdir("/proc/self/task"):
        if thread not in python:
            seconds += int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) / 1e9
    return seconds


class Watch:
    """From a step's first request to the end of its log."""

    def __init__(self) -> None:
        self.steps = 0
        self.profiler = cProfile.Profile() if PROFILE else None

    def begin(self) -> None:
        if self.profiler is not None and self.steps == 1:
            self.profiler.enable()
            atexit.register(self.profiler.dump_stats, PROFILE)
        self.before = (time.process_time(), of_other_threads(), time.thread_time(), time.monotonic())

    def end(self) -> None:
        now = (time.process_time(), of_other_threads(), time.thread_time(), time.monotonic())
        process, others, main, wall = (b - a for a, b in zip(self.before, now, strict=True))
        self.steps += 1
        with open(OUT, "a", encoding="utf-8") as file:
            row = {"python_s": process - others, "main_thread_s": main, "process_s": process, "wall_s": wall}
            file.write(json.dumps(row) + "\n")


watch = Watch()


def watched(module: Any) -> None:
    """In whatever module they are: the makers of roles make idle ones, and a step is measured."""
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    for name in ("generator", "learner", "critic", "reference", "reward"):
        if inspect.isfunction(own.get(f"make_{name}")):
            setattr(module, f"make_{name}", Idle)
    if inspect.isclass(own.get("Rollouts")):
        begin = own["Rollouts"].next

        def measured_next(self: Any, step: int) -> Any:
            watch.begin()
            return begin(self, step)

        own["Rollouts"].next = measured_next
    for name in ("TrainingRun", "Recorder"):
        end = getattr(own.get(name), "log", None)
        if end is not None:

            def measured_log(self: Any, *args: Any, end: Any = end, **named: Any) -> None:
                end(self, *args, **named)
                watch.end()

            own[name].log = measured_log


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name.startswith("rlhf_ray") else None
        if spec is None or spec.loader is None or not spec.origin:
            return spec
        if not spec.origin.startswith(CHECKOUT):
            raise ImportError(f"{spec.origin} is not of {CHECKOUT}: this would measure another checkout")
        run = spec.loader.exec_module

        def run_and_watch(module: Any) -> None:
            run(module)
            watched(module)

        spec.loader.exec_module = run_and_watch
        return spec


if OUT:
    sys.meta_path.insert(0, Finder())
