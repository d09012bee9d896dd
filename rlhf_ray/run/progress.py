"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log file, completions, alarms."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from rlhf_ray.clock import Clock
from rlhf_ray.config.redacted import legible, redacted
from rlhf_ray.run.observer import Alarm, Observer, StepRecord

_SHOWN_SAMPLES = 3
# (label, metric, format): what fits on one line
SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("KL", "kl_ref", "{:.4f}"),
    ("tok/s", "perf/tokens_per_s", "{:,.0f}"),
)


def _console() -> Console:
    """Standard output; in a notebook plain lines, where a bar cannot be drawn over, and each line would be a block of
    HTML."""
    console = Console()
    return Console(force_jupyter=False, force_terminal=False) if console.is_jupyter else console


class _LeftColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["left"])


class Progress:
    """Progress of one loop of `total` steps, of which `done` lie behind it.

        progress = Progress("grpo", 400)
        progress.update(12, metrics)
        progress.show_samples(12, [("2+2=", "4", 1.0)])
        progress.close()

    On a terminal it is a bar; elsewhere a line at most every `every_s` seconds, and the first and last step.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, console: Console | None = None,
                 every_s: float = 5.0, clock: Clock = time.perf_counter) -> None:  # fmt: skip
        self._title, self._total, self._every_s, self._clock = title, total, every_s, clock
        self._console = console or _console()
        self._recent: deque[tuple[float, int]] = deque([(clock(), done)], maxlen=20)
        self._last_line = float("-inf")
        self._bar: Bar | None = None
        if self._console.is_terminal:
            self._bar = Bar(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                            TextColumn("{task.fields[shown]}", markup=False), _LeftColumn(),
                            console=self._console)  # fmt: skip
            self._task = self._bar.add_task(title, total=total, completed=done, shown="", left="")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back. May be called twice."""
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` steps are done; `metrics` are those of the last one."""
        now = self._clock()
        self._recent.append((now, step))
        shown = "  ".join(f"{label} {form.format(float(metrics[name]))}"
                          for label, name, form in SHOWN if name in metrics)  # fmt: skip
        left = self._left(step)
        if self._bar:
            self._bar.start()  # here, not in the constructor: what is printed before the first step stays plain
            self._bar.update(self._task, completed=step, shown=shown, left=left)
        elif now - self._last_line >= self._every_s or step >= self._total:
            self._last_line = now
            self._print(f"{self._title} {step}/{self._total}  {shown}  {left}".rstrip())

    def show_samples(
        self, step: int, rows: Iterable[tuple[str, str, float | None]], *, judged: bool = True
    ) -> None:  # fmt: skip
        """Show (prompt, completion, reward) of some completions; a reward of None was left out of the loss. `judged`:
        whether there are rewards at all."""
        cells = [
            ("none" if reward is None else f"{reward:.3f}", _shortened(prompt, 200), _shortened(completion, 400))
            for prompt, completion, reward in rows
        ]
        if not self._bar:
            marks = [f"[{reward}] " if judged else "" for reward, *_ in cells]
            lines = [f"  {mark}{row[1]} -> {row[2]}" for mark, row in zip(marks, cells, strict=True)]
            self._print("\n".join([f"{self._title} step {step}: samples", *lines]))
            return
        table = Table(expand=True, box=None)
        first = 0 if judged else 1
        for column, ratio in (("reward", 1), ("prompt", 4), ("completion", 6))[first:]:
            table.add_column(column, ratio=ratio, overflow="fold")
        for row in cells:
            # Text: a model may write [red] or [/], which must not be read as markup
            table.add_row(*(Text(cell) for cell in row[first:]))
        self._console.print(Panel(table, title=f"step {step}: samples", title_align="left"))

    def note(self, text: str) -> None:
        """A line for the reader: a checkpoint written, a worker restarted."""
        self._print(redacted(text))

    def alarm(self, text: str) -> None:
        """A line that must not be overlooked: bold on a terminal."""
        self._print(f"ALARM {redacted(text)}", style="bold yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        # soft_wrap: a log file is not 80 columns wide
        self._console.print(legible(text), style=style, markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        (first_time, first_step), (last_time, _) = self._recent[0], self._recent[-1]
        if step <= first_step or step >= self._total:
            return ""
        return f"{_duration((last_time - first_time) / (step - first_step) * (self._total - step))} left"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def on_one_line(text: str) -> str:
    """The text with its line breaks written as backslash and n, and nothing in it that would steer a terminal."""
    return legible(text.replace("\n", "\\n"))


def _shortened(text: str, limit: int) -> str:
    text = on_one_line(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


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
