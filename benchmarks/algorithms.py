"""Every algorithm on two small tasks, three seeds each, at the same budget: curves, a table, and the numbers.

    python benchmarks/algorithms.py --reviews reviews.jsonl --jobs 2     # or: make algorithms

Each run is the command that users run, in a process of its own with one thread; a finished run is not repeated. The
results go to docs/algorithms_results.md, docs/images/ and docs/algorithms_results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REVIEWS = ROOT.parent / "shared" / "data" / "movie_reviews.train.jsonl"
SEEDS = (0, 1, 2)
# The coefficient of a KL that is to be measured and not to be felt.
MEASURED = 1e-9
# Steps at the end of a curve whose mean counts.
LAST = 5
# Of the page, people write what stands before this line.
MARKER = "<!-- from here on: python benchmarks/algorithms.py -->"

# Two optimiser steps on each batch: with one, every importance ratio is 1 and all clipped losses are the same.
_RATIO = ("learner.minibatches=2",)
# One, for it has no ratio; at twice the rate. (ReMax too has one step, and is too noisy for twice the rate.)
_PLAIN = ("learner.lr={lr2}",)
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grpo": ("algorithm.name=grpo", *_RATIO),
    "grpo, no std": ("algorithm.name=grpo", "algorithm.normalize_std=false", *_RATIO),
    "dr_grpo": ("algorithm.name=dr_grpo", *_RATIO),
    "dapo": ("algorithm.name=dapo", *_RATIO),
    "dapo, no length penalty": ("algorithm.name=dapo", "algorithm.overlong_buffer=0", *_RATIO),
    "gspo": ("algorithm.name=gspo", *_RATIO),
    "cispo": ("algorithm.name=cispo", *_RATIO),
    "rloo": ("algorithm.name=rloo", *_RATIO),
    "reinforce": ("algorithm.name=reinforce", *_PLAIN),
    "reinforce_pp": ("algorithm.name=reinforce_pp", *_RATIO),
    "reinforce_pp_baseline": ("algorithm.name=reinforce_pp_baseline", *_RATIO),
    "remax": ("algorithm.name=remax", "rollout.group_size=7"),
    "ppo": ("algorithm.name=ppo", "critic.lr=1e-3", "critic.minibatches=2", *_RATIO),
    "pass_at_k": ("algorithm.advantage=pass_at_k", "algorithm.k=4", *_RATIO),
}
# A penalty of their own, which is left as it is.
_OWN_KL = ("ppo", "reinforce_pp")


@dataclass(frozen=True)
class Task:
    """A config of this repository, made smaller."""

    config: str
    settings: tuple[str, ...]
    lr: float
    metrics: dict[str, str]  # of the evaluation: what the table calls it -> its name in summary.json


TASKS = {
    "sums": Task(
        "configs/grpo_arithmetic.yaml",
        (
            "steps=80", "rollout.prompts_per_step=32", "rollout.group_size=8", "rollout.max_new_tokens=5",
            "rollout.temperature=1.0", "learner.lr_warmup_steps=5", "learner.lr_schedule=constant",
            "model.scratch.hidden_size=64", "model.scratch.layers=2", "model.tokenizer.alphabet=0123456789+=",
            "warm_start.steps=60", "warm_start.target_accuracy=null", "warm_start.lr=2e-3", "warm_start.batch_size=64",
            "data.path={sums}", "data.eval_path={sums}", "eval.size=100",
        ),
        lr=5e-4, metrics={"accuracy, greedy": "accuracy"},
    ),
    "reviews": Task(
        "configs/grpo_reviews.yaml",
        (
            "steps=30", "rollout.prompts_per_step=24", "rollout.group_size=8", "rollout.max_new_tokens=16",
            "model.tokenizer.vocab_size=2000", "model.scratch.hidden_size=96", "model.scratch.intermediate_size=288",
            "warm_start.steps=500", "algorithm.kl_controller=fixed", "data.path={reviews}",
        ),
        lr=2e-4, metrics={"reward, held-out prompts": "reward", "distinct-2": "distinct_2"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One command line; its folder is its name."""

    task: str
    algorithm: str
    seed: int

    def folder(self, root: Path) -> Path:
        return root / self.task / f"seed{self.seed}" / self.algorithm.replace(", ", "_").replace(" ", "_")


@dataclass(frozen=True)
class Result:
    """What a run measured. Seconds are those of the processor, which another program's load does not change."""

    task: str
    algorithm: str
    seed: int
    rewards: list[float]  # mean of each step's own samples
    before: dict[str, float]  # the task's metrics
    after: dict[str, float]
    kl: float  # to the start policy, nats a completion, the last steps' mean
    samples: float  # that the policy wrote
    cpu_seconds: float
    peak_mb: float
    commit: str = ""  # whose code ran

    @property
    def reward(self) -> float:
        return statistics.fmean(self.rewards[-LAST:])


def write_sums(target: Path) -> None:
    """The 100 sums of two digits. All of them are practised and asked: the question is how fast a policy improves."""
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = [(a, b, a + b) for a in range(10) for b in range(10)]
    lines = [json.dumps({"prompt": f"{a}+{b}=", "text": f"{a}+{b}={c}", "answer": str(c)}) for a, b, c in rows]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings_of(run: Run, root: Path, reviews: Path) -> list[str]:
    task = TASKS[run.task]
    start = root / run.task / f"seed{run.seed}" / "start" / "start"
    kl = () if run.algorithm in _OWN_KL else (f"algorithm.kl_coef={MEASURED}",)
    fixed = (
        *task.settings, f"seed={run.seed}", f"model.path={start}", "model.tokenizer.path=null", "warm_start.steps=0",
        f"learner.lr={task.lr}", "checkpoint.every=0", "logging.loggers=[]", "device=cpu", *kl,
    )  # fmt: skip
    names = {"reviews": reviews, "sums": root / "sums.jsonl", "lr2": 2 * task.lr}
    return [setting.format(**names) for setting in (*fixed, *ALGORITHMS[run.algorithm])]


def start_settings(task: Task, seed: int, root: Path, reviews: Path) -> list[str]:
    """One step at a rate that changes nothing: what is wanted is the warm start, which all algorithms share."""
    own = (*task.settings, f"seed={seed}", "steps=1", "learner.lr=1e-45", "logging.loggers=[]", "device=cpu")
    return [setting.format(reviews=reviews, sums=root / "sums.jsonl") for setting in own]


def commit() -> str:
    """The code's; with a plus where it was changed since. Empty where there is no repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def execute(config: str, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the command; CPU seconds and peak memory of its process, and the commit of the code.

    A run that is finished is not repeated; one that was cut off, or had other settings, begins again.
    """
    marker = folder / "usage.json"
    if marker.exists():
        finished = json.loads(marker.read_text(encoding="utf-8"))
        if finished["settings"] == list(settings):
            return finished["used"]
    shutil.rmtree(folder, ignore_errors=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlhf_ray.cli", "rl", str(ROOT / config), *settings, "--run-dir", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    code = commit()  # now: it may change while the run goes on
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as file:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)]
        pid = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed; see {log}")
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB here
    seconds, megabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale / 1e6
    used = {"cpu_seconds": round(seconds, 2), "peak_mb": round(megabytes, 1), "commit": code}
    marker.write_text(json.dumps({"settings": list(settings), "used": used}), encoding="utf-8")
    return used


def measure(run: Run, root: Path, reviews: Path) -> Result:
    folder = run.folder(root)
    used = execute(TASKS[run.task].config, settings_of(run, root, reviews), folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = TASKS[run.task].metrics.values()
    size = next(int(s.partition("=")[2]) for s in TASKS[run.task].settings if s.startswith("rollout.prompts_per_step"))
    return Result(
        run.task, run.algorithm, run.seed,
        rewards=[round(row["reward/mean"], 4) for row in rows],
        before={name: round(summary["before"][name], 4) for name in metrics},
        after={name: round(summary["after"][name], 4) for name in metrics},
        kl=round(statistics.fmean(row["kl_ref"] for row in rows[-LAST:]), 4),
        samples=sum(8 * row.get("groups/asked", size) for row in rows),
        **used,
    )  # fmt: skip


def all_runs(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """Seed by seed, so that a benchmark that is stopped has complete comparisons."""
    for seed in seeds:
        for task in tasks:
            for algorithm in ALGORITHMS:
                yield Run(task, algorithm, seed)


def run_all(tasks: Sequence[str], seeds: Sequence[int], root: Path, reviews: Path, jobs: int) -> list[Result]:
    def start(item: tuple[str, int]) -> None:
        task, seed = item
        settings = start_settings(TASKS[task], seed, root, reviews)
        execute(TASKS[task].config, settings, root / task / f"seed{seed}" / "start")

    def timed(run: Run) -> Result:
        began = time.monotonic()
        result = measure(run, root, reviews)
        print(
            f"{run.task:10} seed {run.seed} {run.algorithm:22} reward {result.rewards[0]:.3f} -> {result.reward:.3f}"
            f"  {list(result.after.values())}  KL {result.kl:.2f}  {result.cpu_seconds:.0f} s CPU"
            f" ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        return result

    write_sums(root / "sums.jsonl")
    results: list[Result] = []
    with ThreadPoolExecutor(jobs) as pool:
        for seed in seeds:
            list(pool.map(start, [(task, seed) for task in tasks]))
            results += pool.map(timed, all_runs(tasks, (seed,)))
    return results


# ---- what people read -----------------------------------------------------------------------------------------


def smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    """Mean of each value and up to `width` - 1 before it."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def draw(task: str, results: Sequence[Result], target: Path) -> None:
    """One small panel an algorithm: its mean over the seeds, their range, and all the others in grey."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves = {name: [smoothed(r.rewards) for r in results if r.algorithm == name] for name in ALGORITHMS}
    curves = {name: runs for name, runs in curves.items() if runs}
    means = {name: [statistics.fmean(point) for point in zip(*runs, strict=True)] for name, runs in curves.items()}
    columns = 5
    figure, axes = pyplot.subplots(
        -(-len(curves) // columns), columns, figsize=(13, 7.5), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, (name, runs) in zip(axes.flat, curves.items(), strict=False):
        for other in means.values():
            axis.plot(range(1, len(other) + 1), other, color="#d0d0d0", linewidth=0.8)
        steps, points = range(1, len(means[name]) + 1), list(zip(*runs, strict=True))
        axis.fill_between(steps, [min(p) for p in points], [max(p) for p in points], color="#4878d0", alpha=0.25)
        axis.plot(steps, means[name], color="#1f4e9c", linewidth=1.8)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.supxlabel("step")
    figure.supylabel("mean reward of the step's samples (mean of 5 steps; band: least and greatest seed)", fontsize=9)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=90)
    pyplot.close(figure)


def spread(values: Sequence[float], digits: int) -> str:
    """mean ± standard deviation over the seeds"""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(task: str, results: Sequence[Result]) -> list[str]:
    metrics = TASKS[task].metrics
    heads = ["", f"reward, last {LAST} steps", *metrics, "KL to start, nats", "samples", "CPU, s", "peak memory, MB"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    starts = {r.seed: r for r in results}.values()
    before = [spread([r.before[name] for r in starts], 3) for name in metrics.values()]
    lines.append(f"| *start* | | {' | '.join(before)} | 0 | | | |")
    for name in ALGORITHMS:
        runs = [r for r in results if r.algorithm == name]
        if runs:
            cells = [spread([r.reward for r in runs], 3)]
            cells += [spread([r.after[metric] for r in runs], 3) for metric in metrics.values()]
            numbers = (("kl", 2), ("samples", 0), ("cpu_seconds", 0), ("peak_mb", 0))
            cells += [spread([getattr(r, number) for r in runs], digits) for number, digits in numbers]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def write_report(results: Sequence[Result], docs: Path) -> None:
    target = docs / "algorithms_results.md"
    head = target.read_text(encoding="utf-8").partition(MARKER)[0] if target.exists() else "# Results\n\n"
    page = [head + MARKER, ""]
    for task in dict.fromkeys(r.task for r in results):
        own = [r for r in results if r.task == task]
        draw(task, own, docs / "images" / f"algorithms_{task}.png")
        page += [f"## {task.capitalize()}", "", f"![Reward curves](images/algorithms_{task}.png)", ""]
        seeds = ", ".join(str(seed) for seed in sorted({r.seed for r in own}))
        code = ", ".join(dict.fromkeys(r.commit for r in own if r.commit))
        page += [*table(task, own), "", f"Seeds: {seeds}." + (f" Code: commit {code}." if code else ""), ""]
    target.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    lines = [json.dumps(asdict(result)) for result in results]
    (docs / "algorithms_results.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "algorithms", help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the report")
    parser.add_argument("--reviews", type=Path, default=REVIEWS, help="JSONL with a text field; without it: arithmetic")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    given = parser.parse_args()
    tasks = [task for task in TASKS if task != "reviews" or given.reviews.is_file()]
    if "reviews" not in tasks:
        print(f"{given.reviews}: no such file, so the reviews task is left out; name one with --reviews", flush=True)
    seeds = range(given.seeds)
    write_report(run_all(tasks, seeds, given.runs.resolve(), given.reviews.resolve(), given.jobs), given.docs)


if __name__ == "__main__":
    main()
