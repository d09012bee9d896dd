"""The same GRPO job through TRL's GRPOTrainer and through `rlhf-ray` local, in turns, on one machine.

    python benchmarks/vs_trl.py [--shape short] [--sides trl ours] [--steps 8] [--rounds 3] [--json result.json]

Both get the same model folder, prompts, reward, group size, token limit, optimiser settings and KL coefficient, and
both keep a reference model. Ours runs as it is and with `learner.share_prompts` (a group's prompt is computed once, the
same numbers to rounding), which TRL cannot. Each round runs every side in a fresh process, in turns, the next round in
the other order. A side's figure is samples a second of the wall clock after warm-up steps, in its fastest round: what
else a machine does only makes it slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WARMUP, LR, KL = 3, 1e-5, 0.04


@dataclass(frozen=True)
class Shape:
    """A step: so many prompts of so many tokens, `group` answers to each of up to `new` tokens."""

    prompts: int
    group: int
    tokens: int
    new: int

    @property
    def rows(self) -> int:
        return self.prompts * self.group


SHAPES = {"short": Shape(8, 8, 10, 64), "prompts": Shape(2, 8, 512, 64), "long": Shape(4, 8, 16, 256)}
SIDES = ("trl", "ours", "sharing")  # sharing: ours with learner.share_prompts


def reward_length(completions: list[str], **columns: object) -> list[float]:
    """Cheap on purpose: what is measured is the trainer."""
    return [len(set(text)) / 20 for text in completions]


def make_job(folder: Path, shape: Shape) -> None:
    """A 1M-parameter Qwen2 shape with a character tokenizer, and prompts of so many characters."""
    from rlhf_ray.models.scratch import build_scratch
    from rlhf_ray.models.tokenizers import build_tokenizer

    alphabet = "abcdefghijklmnopqrstuvwxyz .,"
    longest = max(128, shape.tokens + shape.new)
    tokenizer = build_tokenizer("char", [alphabet], max_length=longest)
    model = build_scratch(
        "qwen2", vocab_size=len(tokenizer), hidden_size=160, layers=4, heads=4, intermediate_size=480,
        max_length=longest, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    letters = alphabet[:26]
    rows = [{"prompt": "".join(letters[(i * 7 + j * 3) % 26] for j in range(shape.tokens))} for i in range(256)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def run_trl(folder: Path, shape: Shape, steps: int) -> list[float]:
    """Seconds of each step."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.stamps = [time.perf_counter()]

        def on_step_end(self, args, state, control, **kwargs):
            self.stamps.append(time.perf_counter())

    clock = Clock()
    settings = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=shape.rows, num_generations=shape.group,
        max_completion_length=shape.new, learning_rate=LR, beta=KL, max_steps=steps, temperature=1.0,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_steps=1_000, use_cpu=True,
        bf16=False, gradient_checkpointing=False, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0,
        disable_tqdm=True, loss_type="dapo",
    )  # fmt: skip
    data = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    GRPOTrainer(
        str(folder / "model"), reward_funcs=reward_length, args=settings, train_dataset=data, callbacks=[clock]
    ).train()
    return [b - a for a, b in zip(clock.stamps, clock.stamps[1:], strict=False)]


def run_ours(folder: Path, shape: Shape, steps: int, *, share_prompts: bool) -> list[float]:
    """Seconds of each step, of the command that users run.

    Micro-batches of 1,024 tokens: rows of like length side by side, so that short answers are padded little.
    """
    config = {
        "name": "vs-trl", "steps": steps, "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "prompts.jsonl"), "max_prompt_tokens": shape.tokens, "eval_size": 8},
        "rollout": {
            "prompts_per_step": shape.prompts, "group_size": shape.group, "max_new_tokens": shape.new
        },
        "rewards": [{"function": f"{Path(__file__).resolve()}:reward_length"}],
        "algorithm": {"name": "grpo", "kl_coef": KL},
        "learner": {"lr": LR, "tokens_per_microbatch": 1024, "share_prompts": share_prompts},
        "eval": {"size": 8}, "device": "cpu",
    }  # fmt: skip
    (folder / "ours.yaml").write_text(json.dumps(config), encoding="utf-8")
    run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, "-m", "rlhf_ray.cli", "rl", str(folder / "ours.yaml"), "--run-dir", str(run_dir)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    # A step's rollouts are the last thing that it writes: from file to file is a step with all its logging.
    stamps = [(run_dir / "rollouts" / f"step_{step + 1}.jsonl").stat().st_mtime for step in range(steps)]
    return [0.0, *(b - a for a, b in zip(stamps, stamps[1:], strict=False))]


def measure(side: str, folder: Path, shape: str, steps: int) -> float:
    """Samples a second of one run in a fresh process, after the warm-up steps."""
    out = folder / f"{side}.json"
    options = ["--side", side, "--shape", shape, "--folder", folder, "--steps", steps, "--json", out]
    command = [sys.executable, __file__, *map(str, options)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = json.loads(out.read_text())[WARMUP:]
    return SHAPES[shape].rows * len(seconds) / sum(seconds)


def compare(folder: Path, shape: str, sides: Sequence[str], steps: int, rounds: int) -> dict[str, object]:
    make_job(folder, SHAPES[shape])
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            rates[side].append(measure(side, folder, shape, steps))
            print(f"round {turn + 1} {side}: {rates[side][-1]:.1f} samples/s", flush=True)
    best = {side: max(of_rounds) for side, of_rounds in rates.items()}
    return {"samples_per_s": rates, "times_trl": {side: best[side] / best["trl"] for side in sides if side != "trl"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="short", help="what a step consists of")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="trl and what to hold against it")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "trl" not in args.sides:
        parser.error("--sides lacks trl, against which the others are measured")
    if args.side:
        if args.side == "trl":
            seconds = run_trl(args.folder, SHAPES[args.shape], args.steps)
        else:
            shares = args.side == "sharing"
            seconds = run_ours(args.folder, SHAPES[args.shape], args.steps, share_prompts=shares)
        args.json.write_text(json.dumps(seconds))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), args.shape, args.sides, args.steps, args.rounds)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
