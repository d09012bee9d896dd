"""What a step of thousands of rows costs the process of the loop on Ray, in CPU time, where its roles do nothing.

    python benchmarks/driver.py [CHECKOUT ...] [--rows 16384] [--group 16] [--ranks 2] [--generators 2] [--rounds 2]

It runs `rlhf-ray rl` on a Ray of this machine with the loop, the handles and the actors of each checkout (this one, if
none is named), in turns; only the roles inside of the actors are idle ones (`idle/sitecustomize.py`). Counted are all
of the driver's own threads that run Python, garbage collection included, from a step's first request to its last log,
without the run's first step. Ray's threads are shown beside them. The figure is the median over steps and rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
IDLE = HERE / "idle"


def command_of(checkout: Path, folder: Path, args: argparse.Namespace) -> list[str]:
    return [
        sys.executable, "-m", "rlhf_ray.cli", "rl", str(checkout / "configs" / "grpo_arithmetic.yaml"),
        "--run-dir", str(folder), f"steps={1 + args.steps}", "device=cpu", "executor=ray", "warm_start.steps=0",
        "warm_start.target_accuracy=null", f"rollout.prompts_per_step={args.rows // args.group}",
        f"rollout.group_size={args.group}", "algorithm.kl_coef=0.05", "generator.engine=vllm",
        f"generator.count={args.generators}", "learner.engine=deepspeed", f"learner.world_size={args.ranks}",
        "learner.share_prompts=false", "eval.size=1", "sync.canary=false", "ray.start_deadline_s=900",
        *args.settings,
    ]  # fmt: skip


def measure(checkout: Path, args: argparse.Namespace, profile: Path | None = None) -> list[dict[str, float]]:
    """One run of this checkout: what each step has cost, without the first."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "steps.jsonl"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
        env |= {"PYTHONPATH": f"{IDLE}:{checkout}", "DRIVER_CHECKOUT": f"{checkout}/", "DRIVER_OUT": str(out)}
        env.pop("DRIVER_PROFILE", None)
        if profile is not None:
            env["DRIVER_PROFILE"] = str(profile)
        run = subprocess.run(
            command_of(checkout, Path(temporary) / "run", args), cwd=checkout, env=env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if run.returncode:
            raise SystemExit(f"{checkout}: the run failed:\n{run.stdout[-3000:]}")
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="*", default=[HERE.parent])
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2, help="of the learner")
    parser.add_argument("--generators", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="that count, in each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--settings", nargs="+", default=[], help="further settings of both runs: algorithm.name=dapo")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="write cProfile's findings in the last run there, and show them")
    args = parser.parse_args()
    checkouts = [checkout.resolve() for checkout in args.checkouts]
    found: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    for number in range(args.rounds):
        for checkout in checkouts if number % 2 == 0 else reversed(checkouts):
            found[checkout] += measure(checkout, args)
    results = []
    print(f"{args.rows} rows a step: milliseconds of the driver's CPU, medians of {args.rounds * args.steps} steps")
    print(f"{'checkout':40} {'its Python':>10} {'main thread':>12} {'with Ray':>9} {'share of the first':>19}")
    for checkout, steps in found.items():
        medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        results.append({"checkout": str(checkout), **medians})
        share = medians["python_s"] / results[0]["python_s"]
        shown = [1e3 * medians[name] for name in ("python_s", "main_thread_s", "process_s")]
        print(f"{checkout!s:40} {shown[0]:10.1f} {shown[1]:12.1f} {shown[2]:9.1f} {share:19.2f}")
    if args.json:
        args.json.write_text(json.dumps({"rows": args.rows, "group": args.group, "results": results}, indent=1))
    if args.profile:
        measure(checkouts[-1], args, args.profile)
        pstats.Stats(str(args.profile)).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
