"""The same short runs in two checkouts: do they write the same tokens and compute the same numbers?

    python benchmarks/same_numbers.py BEFORE [AFTER] [--only grpo/local ppo ...] [--work FOLDER]

A cell of the matrix is a job and an executor. Both checkouts run it, each in processes of its own with this
interpreter. Compared are the tokens and log-probabilities of every sample, each row's rewards, and every number of
metrics.jsonl and of the evaluations (losses, gradient norms, ...) that is no time and no size. Tokens are to be equal,
and numbers within 1e-6 of each other (where they are larger than 1, within that share of them).

A token may differ only where its random number lies within 1e-5 of a boundary (greedily, and in vLLM's draws: where
the two best are as close). The row then gets BEFORE's answer (`listener/sitecustomize.py`), and all that follows is
compared as if it had been drawn. Every such exception is printed. Cells of BEFORE that lie in --work already are not
run again.

`resume` instead of an executor kills AFTER's own run on the way and resumes it: all its numbers are to be bit-equal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LISTENER = Path(__file__).resolve().parent / "listener"
TOLERANCE = 1e-6
CLOSE = 1e-5
STEPS = 20

# Times, speeds and sizes of memory: another machine's, another day's.
PASSED_OVER = (
    "time/", "cost/", "perf/tokens_per_s", "perf/samples_per_s", "perf/mfu", "perf/peak_mem_gb", "sync/gb_per_s",
)  # fmt: skip

# A reward that a model which knows nothing yet earns now and then: exact answers it has none.
REWARD = """
def even(completions):
    return [sum(letter in "02468aeiou" for letter in text) / (1 + len(text)) for text in completions]
"""

SMALL = (
    f"steps={STEPS}", "device=cpu", "model.scratch.hidden_size=64", "model.scratch.heads=2", "model.scratch.layers=2",
    "eval.size=16", "eval.every=10", "data.eval_size=16", "logging.loggers=[]", "logging.rollouts=1000",
)  # fmt: skip
ARITHMETIC = (
    *SMALL, "rollout.prompts_per_step=8", "rollout.group_size=4", "warm_start.steps=60",
    "warm_start.target_accuracy=null",
    "rewards=[{function: exact_answer}, {function: '$WORK/reward.py:even', isolated: false}]",
)  # fmt: skip
# name -> (a config of BEFORE, what is changed in it)
JOBS = {
    "grpo": ("grpo_arithmetic", (*ARITHMETIC, "algorithm.kl_coef=0.05")),
    "ppo": (
        "ppo_reviews",
        (*SMALL, "rollout.prompts_per_step=16", "rollout.max_new_tokens=8", "model.tokenizer.vocab_size=400",
         "warm_start.steps=40", "critic.warmup_steps=2", "reward_model.path=$WORK/classifier/model"),
    ),
    "dapo": (
        "grpo_arithmetic",
        (*ARITHMETIC, "algorithm.name=dapo", "rollout.temperatures=[0.7, 1.0]", "rollout.reference_answers=1",
         "algorithm.correction=truncate", "learner.minibatches=2"),
    ),
    "remax": ("grpo_arithmetic", (*ARITHMETIC, "algorithm.name=remax", "rollout.group_size=2")),
    "lora": ("grpo_arithmetic", (*ARITHMETIC, "algorithm.kl_coef=0.05", "model.lora.r=4", "learner.lr=1e-3")),
}  # fmt: skip
EXECUTORS = {
    "local": (),
    # Two generators that write 16 rows each side by side.
    "ray-hf": ("executor=ray", "generator.count=2", "generator.batch_size=16"),
    "ray-vllm": (
        "executor=ray", "generator.engine=vllm", "generator.kv_cache_gb=0.1", "learner.engine=deepspeed",
        "learner.world_size=2", "learner.zero_stage=2",
    ),
}  # fmt: skip
# The reward model that `ppo` is judged by, made once, by BEFORE.
CLASSIFIER = (
    "classifier", "configs/classifier_reviews.yaml", "epochs=1", "device=cpu", "model.scratch.hidden_size=32",
    "model.tokenizer.vocab_size=1000", "data.eval_size=20", "eval.test_path=null",
)  # fmt: skip


@dataclass
class Report:
    """What a cell has shown."""

    problems: list[str] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)
    compared: int = 0
    largest: float = 0.0
    largest_at: str = ""

    def compare(self, before: Any, after: Any, where: str, tolerance: float = TOLERANCE) -> None:
        """Values as JSON has them. What only `after` has is new, and not compared."""
        if isinstance(before, dict) and isinstance(after, dict):
            for name in before:
                if name not in after:
                    self.problems.append(f"{where}: {name} is missing")
                elif not name.startswith(PASSED_OVER):
                    self.compare(before[name], after[name], f"{where}: {name}", tolerance)
        elif isinstance(before, list) and isinstance(after, list):
            if len(before) != len(after):
                self.problems.append(f"{where}: {len(after)} of them, and {len(before)} before")
            for index, pair in enumerate(zip(before, after, strict=False)):
                self.compare(*pair, f"{where}[{index}]", tolerance)
        elif is_number(before) and is_number(after):
            self.compared += 1
            apart = distance(before, after)
            if not apart <= tolerance:
                self.problems.append(f"{where}: {after!r}, and {before!r} before")
            elif apart > self.largest:
                self.largest, self.largest_at = apart, where
        elif before != after:
            self.problems.append(f"{where}: {after!r}, and {before!r} before")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def distance(before: float, after: float) -> float:
    """How far they are from each other; above 1, as a share. NaN where only one of them is a number."""
    if before == after or (math.isnan(before) and math.isnan(after)):
        return 0.0
    return abs(before - after) / max(1.0, abs(before))


# ---- running ----------------------------------------------------------------------------------------------------


def run_cell(checkout: Path, arguments: list[str], folder: Path, answers: Path | None, stop_after: int = 0) -> None:
    """A command of this checkout, which listens. `stop_after`: killed after so many steps, and resumed."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    command = [sys.executable, "-m", "rlhf_ray.cli", *arguments, "--run-dir", str(folder / "run")]
    if stop_after:
        start(command, checkout, samples, answers, folder, stop_after)
        command += ["--resume", "auto"]
    status = start(command, checkout, samples, answers, folder)
    if status:
        raise RuntimeError(f"{' '.join(command)} in {checkout} failed:\n{(folder / 'log').read_text()[-3000:]}")


def start(command: list[str], checkout: Path, samples: Path, answers: Path | None, folder: Path, until: int = 0) -> int:
    """The status that the command ends with; with `until`, it is killed after that step."""
    env = {**os.environ, "PYTHONPATH": f"{LISTENER}:{checkout}", "SAME_NUMBERS_OUT": str(samples)}
    env["SAME_NUMBERS_CHECKOUT"] = f"{checkout}/"
    # With several threads, sums end differently from run to run.
    env |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    env.pop("SAME_NUMBERS_ANSWERS", None)
    if answers is not None:
        env["SAME_NUMBERS_ANSWERS"] = str(answers)
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, cwd=checkout, env=env, stdout=log, stderr=subprocess.STDOUT)
        while until and process.poll() is None:
            if len(lines_of(folder / "run" / "metrics.jsonl")) >= until:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        return process.wait()


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def cell_of(name: str, work: Path, before: Path) -> list[str]:
    """The command line of a cell, the same for both checkouts."""
    job, _, executor = name.partition("/")
    config, changes = JOBS[job]
    changes = [change.replace("$WORK", str(work)) for change in (*changes, *EXECUTORS.get(executor, ()))]
    return ["rl", str(before / "configs" / f"{config}.yaml"), *changes]


def run_before(before: Path, name: str, work: Path) -> Path:
    """The folder of BEFORE's cell; it may have been run already."""
    folder, arguments = work / "before" / name, cell_of(name, work, before)
    done = folder / "done.json"
    if not done.exists() or json.loads(done.read_text()) != arguments:
        remove(folder)
        run_cell(before, arguments, folder, None)
        merged = [line for file in sorted((folder / "samples").glob("*.jsonl")) for line in lines_of(file)]
        (folder / "answers.jsonl").write_text("".join(line + "\n" for line in merged), encoding="utf-8")
        done.write_text(json.dumps(arguments))
    return folder


def remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


# ---- comparing --------------------------------------------------------------------------------------------------


def samples_in(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was asked for, the sample) of all that the cell's processes have noted."""
    for file in sorted((folder / "samples").glob("*.jsonl")):
        for row in map(json.loads, lines_of(file)):
            yield f"version {row['version']}, sample {row['sample']}, prompt {row['tokens'][: row['start']]}", row


def compare_samples(before: Path, after: Path, report: Report, tolerance: float) -> None:
    expected = dict(samples_in(before))
    seen = set()
    for name, row in samples_in(after):
        seen.add(name)
        if name not in expected:
            report.problems.append(f"{name}: nobody asked for it before")
        else:
            compare_sample(name, expected[name], row, report, tolerance)
    report.problems += [f"{name}: nobody asked for it" for name in expected if name not in seen]


def compare_sample(name: str, before: dict[str, Any], after: dict[str, Any], report: Report, tolerance: float) -> None:
    old, new = (row["tokens"][row["start"] :] for row in (before, after))
    shorter = min(len(old), len(new))
    same = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    if same == len(old) == len(new):
        report.compare(before["truncated"], after["truncated"], f"{name}: truncated")
    else:
        margin = before["margins"][same] if same < len(before["margins"]) else math.nan
        said = f"{name}: token {same} is {new[same : same + 1]}, and {old[same : same + 1]} before"
        if margin <= CLOSE:
            report.exceptions.append(f"{said}: its draw was within {CLOSE:g} of a boundary")
        else:
            report.problems.append(f"{said}: its draw was {margin:g} from a boundary (1: more than {CLOSE:g})")
    report.compare(before["logp"][:same], after["logp"][:same], f"{name}: logp", tolerance)


def compare_runs(before: Path, after: Path, report: Report, tolerance: float) -> None:
    """What the run directories hold."""
    for file in ["metrics.jsonl", *(f"rollouts/step_{step}.jsonl" for step in range(1, STEPS + 1))]:
        rows = [[json.loads(line) for line in lines_of(cell / "run" / file)] for cell in (before, after)]
        report.compare(*rows, file, tolerance)
    ends = [json.loads((cell / "run" / "summary.json").read_text()) for cell in (before, after)]
    for name in ("before", "after"):
        report.compare(ends[0][name], ends[1][name], f"evaluation {name}", tolerance)


def check(name: str, before: Path, after: Path, work: Path) -> Report:
    """Runs a cell in both checkouts, or for `resume` twice in AFTER, and compares."""
    report, folder = Report(), work / "after" / name
    if name in ("ppo/local", "ppo/ray-hf", "ppo/ray-vllm") and not (before / "rlhf_ray" / "sample.py").exists():
        report.exceptions.append("BEFORE, too, whitens its advantages with moments in float64 (listener: hook_masks)")
    remove(folder)
    if name.endswith("/resume"):
        arguments, whole = [*cell_of(name, work, before), "checkpoint.every=6"], folder / "whole"
        run_cell(after, arguments, whole, None)
        run_cell(after, arguments, folder / "killed", None, stop_after=STEPS // 2)
        compare_runs(whole, folder / "killed", report, 0.0)
        if len({(run / "run" / "model" / "model.safetensors").read_bytes() for run in (whole, folder / "killed")}) > 1:
            report.problems.append("the weights at the end are not bit-equal")
        if '"resumed"' not in (folder / "killed" / "run" / "events.jsonl").read_text():
            report.problems.append("the run was not killed on the way")
        return report
    old = run_before(before, name, work)
    run_cell(after, cell_of(name, work, before), folder, old / "answers.jsonl")
    compare_samples(old, folder, report, TOLERANCE)
    compare_runs(old, folder, report, TOLERANCE)
    return report


def show(name: str, report: Report, seconds: float) -> None:
    verdict = "DIFFERENT" if report.problems else "same"
    largest = f", the largest difference {report.largest:.1e} ({report.largest_at})" if report.largest else ""
    print(f"{name}: {verdict}; {report.compared} numbers{largest}; {seconds:.0f} s", flush=True)
    for kind, lines in (("exception", report.exceptions), ("problem", report.problems)):
        for line in lines[:20]:
            print(f"  {kind}: {line}", flush=True)
        if len(lines) > 20:
            print(f"  and {len(lines) - 20} more {kind}s", flush=True)


def main() -> None:
    cells = [f"{job}/{executor}" for executor in (*EXECUTORS, "resume") for job in JOBS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=Path(__file__).resolve().parents[1])
    parser.add_argument("--only", nargs="+", default=[], help=f"cells, jobs or executors of {', '.join(cells)}")
    parser.add_argument("--work", type=Path, help="where both checkouts' runs are kept; empty: nowhere")
    given = parser.parse_args()
    chosen = [cell for cell in cells if not given.only or {cell, *cell.split("/")} & set(given.only)]
    unknown = set(given.only) - {part for cell in cells for part in (cell, *cell.split("/"))}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(cells)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        before, after = given.before.resolve(), given.after.resolve()
        (work / "reward.py").write_text(REWARD)
        if any(cell.startswith("ppo/") for cell in chosen) and not (work / "classifier" / "model").is_dir():
            remove(work / "classifier-cell")
            run_cell(before, list(CLASSIFIER), work / "classifier-cell", None)
            (work / "classifier").symlink_to(work / "classifier-cell" / "run")
        different = []
        for name in chosen:
            began = time.monotonic()
            try:
                report = check(name, before, after, work)
            except RuntimeError as error:  # the other cells still have something to say
                report = Report(problems=[str(error)])
            show(name, report, time.monotonic() - began)
            different += [name] if report.problems else []
    if different:
        raise SystemExit(f"different: {', '.join(different)}")


if __name__ == "__main__":
    main()
