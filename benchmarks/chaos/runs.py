"""A real run whose processes are struck on the way, and what became of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
STRIKER = ROOT / "benchmarks" / "striker"

# PPO with every role that there is, so small that its start is what takes time.
TREE: dict[str, Any] = {
    "name": "chaos",
    "device": "cpu",
    "executor": "ray",
    "model": {
        "path": "scratch:qwen2",
        "tokenizer": {"path": "scratch:char"},
        # vLLM's CPU attention has no kernel for heads narrower than 32.
        "scratch": {"hidden_size": 64, "layers": 2, "heads": 2, "max_length": 32},
    },
    "data": {"path": "task:arithmetic", "max_prompt_tokens": 8, "eval_size": 2},
    "rollout": {"prompts_per_step": 8, "group_size": 2, "max_new_tokens": 8},
    "rewards": [{"function": "regex", "args": {"pattern": "[0-9].*"}}],
    "algorithm": {"name": "ppo", "kl_coef": 0.01},
    "learner": {
        "engine": "deepspeed", "world_size": 2, "zero_stage": 2, "lr": 1e-3, "tokens_per_microbatch": 64,
        "epochs": 2, "minibatches": 2,
    },
    "critic": {"lr": 1e-3, "tokens_per_microbatch": 64, "epochs": 2, "minibatches": 2},
    "generator": {"count": 2, "batch_size": 8},
    "eval": {"size": 2},
    "checkpoint": {"every": 2},
    # A hang is to be noticed soon; a process that is starting beside it may keep a small machine busy for a while.
    "ray": {"pulse_s": 0.5, "silence_s": 8, "start_deadline_s": 240, "call_deadline_s": 120, "restarts": 1000},
    "sync": {"deadline_s": 120},
    "logging": {"loggers": [], "rollouts": 1000},
}  # fmt: skip
ENGINES = {"hf": {}, "vllm": {"engine": "vllm", "kv_cache_gb": 0.1}}
OVERLAPPED: dict[str, Any] = {"rollout": {"max_staleness": 1}, "algorithm": {"correction": "truncate"}}
# Of a run that nothing disturbs, on a machine with other work.
CALM_S = 300.0
SILENCE_S = TREE["ray"]["pulse_s"] + TREE["ray"]["silence_s"]

# Other every time: times, speeds, sizes, what was done about faults; and the last bits of what generators say of their
# own tokens, for these depend on what they write side by side.
PASSED_OVER = (
    "time/", "cost/", "perf/", "sync/gb_per_s", "fault/", "ledger/lost", "ledger/sampled", "dropped_stale", "mismatch/",
    "sync/canary",
)  # fmt: skip


@dataclass(frozen=True)
class Strike:
    """One process, one moment, one signal. `call`: which of the victim's calls; empty: the first that is its work."""

    id: str
    victim: str
    phase: str
    step: int
    signal: str
    after_ms: float = 5.0
    call: tuple[str, ...] = ()


@dataclass(frozen=True)
class Struck:
    """How a run ended, and what it left."""

    folder: Path
    status: int | None  # None: it had to be ended
    seconds: float
    orphans: tuple[str, ...]

    @property
    def words(self) -> list[dict[str, Any]]:
        """The victims' last."""
        return rows_of(self.folder / "chaos" / "strikes.jsonl")

    @property
    def phases(self) -> list[dict[str, Any]]:
        return rows_of(self.folder / "chaos" / "phases.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        events = rows_of(self.folder / "run" / "events.jsonl")
        return [{**event, "time": datetime.fromisoformat(event["time"]).timestamp()} for event in events]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Later ones over earlier ones, section by section."""
    result: dict[str, Any] = {}
    for tree in trees:
        for name, value in tree.items():
            both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
            result[name] = merged(result[name], value) if both else value
    return result


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON, but for one that a kill has cut."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


# ---- running ----------------------------------------------------------------------------------------------------


def run(
    folder: Path, tree: Mapping[str, Any], strikes: Sequence[Strike] = (), *, bound_s: float, restarts: int = 5,
    environment: Mapping[str, str] = {},
) -> Struck:  # fmt: skip
    """The command `rlhf-ray rl`, struck on the way; it has `bound_s` seconds to end by itself."""
    out = folder / "chaos"
    (out / "struck").mkdir(parents=True)
    (out / "plan.json").write_text(json.dumps([vars(strike) for strike in strikes]), encoding="utf-8")
    (folder / "run.yaml").write_text(yaml.safe_dump(dict(tree)), encoding="utf-8")
    env = {**os.environ, **environment, "PYTHONPATH": f"{STRIKER}:{ROOT}", "CHAOS_OUT": str(out.resolve())}
    env |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "CHAOS_PAUSE_S": "0.5"}
    env.pop("RAY_ADDRESS", None)
    # Ray puts its workers behind everything else on the machine, and one that gets no turn gives no sign of life.
    env["RAY_worker_niceness"] = "0"
    command = [sys.executable, "-m", "rlhf_ray.cli", "rl", str(folder / "run.yaml"), "--run-dir", str(folder / "run")]
    command += ["--restart", str(restarts)] if restarts else []
    began = time.monotonic()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        while (status := process.poll()) is None and time.monotonic() - began < bound_s:
            time.sleep(0.1)
    seconds = time.monotonic() - began
    orphans = tuple(end_all(env["CHAOS_OUT"], 0.0 if status is None else 30.0))
    process.wait()
    return Struck(folder, status, seconds, orphans)


def end_all(mark: str, patience_s: float) -> Iterator[str]:
    """Ends what is left of a run: the names of processes that are still there after `patience_s`."""
    until = time.monotonic() + patience_s
    while left := list(marked(mark)):
        if time.monotonic() < until:
            time.sleep(0.5)
            continue
        for process in left:
            with suppress(psutil.Error):
                yield f"{process.name()} ({process.pid}, {process.status()})"
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=10)
        until = 0.0


def marked(mark: str) -> Iterator[psutil.Process]:
    """Processes that were started with this CHAOS_OUT, by whomever."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("CHAOS_OUT") == mark:
                yield process


# ---- verdicts ---------------------------------------------------------------------------------------------------


def calm_run(work: Path, tree: Mapping[str, Any], name: str) -> Path:
    """The undisturbed run of this code, made once."""
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted((ROOT / "rlhf_ray").rglob("*.py"))))
    folder = work / f"calm-{name}-{code.hexdigest()[:8]}"
    if not (folder / "run" / "model").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        calm = run(folder, tree, bound_s=CALM_S, restarts=0)
        if calm.status != 0:
            raise SystemExit(f"chaos: the undisturbed run has failed:\n{calm.log[-3000:]}")
    return folder


def problems_of(struck: Struck, calm: Path | None) -> list[str]:
    """What is wrong with the end of a run; `calm`: with which it must be the same."""
    if struck.status is None:
        return [f"it did not end within {struck.seconds:.0f} s: {last_line(struck.log)}"]
    left = [f"left behind: {', '.join(struck.orphans)}"] if struck.orphans else []
    if struck.status != 0:
        return [f"exit status {struck.status}: {last_line(struck.log)}", *left]
    return [*(differences(calm, struck.folder) if calm else ()), *left]


def last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.startswith("rlhf-ray: ")] or log.splitlines()
    return lines[-1][:400] if lines else ""


# ---- comparing --------------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> str:
    """sha256 of the model at the end; empty if there is none."""
    file = folder / "run" / "model" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def prompts_of(folder: Path) -> list[list[tuple[int, str]]]:
    """Of each step (prompt position, answer) of all rows that were learned from."""
    files = sorted((folder / "run" / "rollouts").glob("step_*.jsonl"), key=lambda path: int(path.stem.split("_")[1]))
    return [[(row["prompt_id"], row["completion"]) for row in rows_of(file)] for file in files]


def differences(calm: Path, struck: Path) -> Iterator[str]:
    """What a synchronous run must have in common with the undisturbed one, and has not."""
    if weights_of(calm) != weights_of(struck) or not weights_of(struck):
        yield "the weights at the end differ" if weights_of(struck) else "there are no weights at the end"
    if prompts_of(calm) != prompts_of(struck):
        yield "other prompts or answers were learned from"
    rows, others = (rows_of(folder / "run" / "metrics.jsonl") for folder in (calm, struck))
    if [row["step"] for row in rows] != [row["step"] for row in others]:
        yield f"steps {[row['step'] for row in others]} are in metrics.jsonl"
        return
    for row, other in zip(rows, others, strict=True):
        names = [name for name in row if not name.startswith(PASSED_OVER)]
        if apart := [name for name in names if other.get(name) != row[name]]:
            yield f"step {row['step']}: {apart[0]} is {other.get(apart[0])}, and {row[apart[0]]} undisturbed"
            return


def open_books(folder: Path, group_size: int) -> Iterator[str]:
    """What is wrong with an overlapped run's books: the conservation law, and each prompt once."""
    rows = rows_of(folder / "run" / "metrics.jsonl")
    if not rows:
        yield "metrics.jsonl is empty"
        return
    last = rows[-1]
    for unit in ("", "_tokens"):
        terms = ("learned", "stale", "filtered", "failed", "baseline", "lost", "open")
        total = sum(last[f"ledger/{term}{unit}"] for term in terms)
        if total != last[f"ledger/sampled{unit}"]:
            yield f"ledger: {last[f'ledger/sampled{unit}']:.0f} sampled{unit}, and {total:.0f} accounted for"
    if last["ledger/open"]:
        yield f"ledger: {last['ledger/open']:.0f} answers are open at the end"
    learned = [position for step in prompts_of(folder) for position, _ in step]
    if len(learned) != len(set(learned)) * group_size:
        yield "a prompt was learned from twice"
    if len(learned) != last["ledger/learned"]:
        yield f"ledger: {last['ledger/learned']:.0f} answers learned from, and rollouts/ has {len(learned)}"


def first(events: Iterable[Mapping[str, Any]], kind: str, after: float) -> float | None:
    """When an event of this kind came first after that time."""
    return min((e["time"] for e in events if e["event"] == kind and e["time"] >= after), default=None)
