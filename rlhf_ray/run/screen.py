"""What a person sees of a run, as an observer: one bar or line after the other, completions now and then, alarms."""

from __future__ import annotations

import time

from rlhf_ray.clock import Clock
from rlhf_ray.run.observer import Alarm, Observer, StepRecord
from rlhf_ray.run.progress import Progress

_SHOWN_SAMPLES = 3


class Screen(Observer):
    """`samples_every`: steps between printed completions; 0: none."""

    def __init__(self, title: str, total: int, done: int = 0, *, samples_every: int = 0,
                 clock: Clock = time.monotonic) -> None:  # fmt: skip
        self.samples_every = samples_every
        self._clock = clock
        self._progress = Progress(title, total, done, clock=clock)

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """A loop of `total` steps begins: the time left is reckoned from here."""
        self._progress.close()  # a terminal holds one live bar at a time
        self._progress = Progress(title, total, done, clock=self._clock)

    def step(self, record: StepRecord) -> None:
        self._progress.update(record.step, record.metrics)
        if record.samples and self.shows_samples(record.step):
            rows = [(row["prompt"], row["completion"], row.get("reward")) for row in record.samples[:_SHOWN_SAMPLES]]
            judged = any("reward" in row for row in record.samples)
            self._progress.show_samples(record.step, rows, judged=judged)

    def shows_samples(self, step: int) -> bool:
        """Whether completions are printed after this step."""
        return self.samples_every > 0 and step % self.samples_every == 0

    def alarm(self, alarm: Alarm) -> None:
        self._progress.alarm(f"step {alarm.step}: {alarm.kind}: {alarm.reason}")

    def note(self, text: str) -> None:
        self._progress.note(text)

    def close(self) -> None:
        self._progress.close()
