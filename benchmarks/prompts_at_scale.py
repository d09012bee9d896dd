"""What it costs to read the prompts of an RL run: CPU seconds and memory at ten rows and at a million, twice.

    python benchmarks/prompts_at_scale.py ROWS.jsonl [--field question] [--rows 10 1000000]

The rows of the file are repeated, each with a number of its own. Each start is a process of its own, which does what
`rlhf-ray rl` does before it loads a model: reads the settings, the tokenizer and the prompts, checks them, and asks the
first step's. The first start of a large file fills the cache, the second finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(config: Path) -> dict[str, float]:
    """Of this process, from its first import on."""
    from rlhf_ray.config.load import load_config
    from rlhf_ray.rollout.choose import Asking
    from rlhf_ray.start.rl_inputs import check_inputs, sources_of

    settings = load_config(config)
    tokenizer, train, held_out, _ = check_inputs(settings, None)
    asking = Asking(train, settings.rollout, settings.algorithm, seed=settings.seed, steps=settings.steps)
    requests = asking.requests(range(settings.rollout.prompts_per_step))
    sources_of(settings.eval, train, held_out, tokenizer)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "prompts": len(train) + len(held_out), "tokens": sum(map(len, requests.tokens)),
        "cpu_s": used.ru_utime + used.ru_stime, "peak_mib": _peak_mib(),
    }  # fmt: skip


def _peak_mib() -> float:
    """Linux: of this program alone, where `ru_maxrss` begins with what the process held that started it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSONL; with --start: a config")
    parser.add_argument("--field", default="question")
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 1_000_000])
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.file)))
        return
    lines = [line for line in arguments.file.read_text(encoding="utf-8").split("\n") if line]
    with tempfile.TemporaryDirectory() as folder:
        _make_model(lines, arguments.field, Path(folder))
        print("| rows | start | CPU, s | peak, MiB | wall, s |\n| --- | --- | --- | --- | --- |")
        for count in arguments.rows:
            config = _make_run(lines, count, arguments.field, Path(folder))
            for which in ("first", "second"):
                began = time.perf_counter()
                command = [sys.executable, __file__, "--start", str(config)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment())
                found = json.loads(done.stdout.splitlines()[-1])
                wall = time.perf_counter() - began
                cells = f"{found['cpu_s']:.1f} | {found['peak_mib']:.0f} | {wall:.0f}"
                print(f"| {count:,} | {which} | {cells} |", flush=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def _make_model(lines: list[str], field: str, folder: Path) -> None:
    """A small one, with a tokenizer of 16,384 pieces and a chat template, as a model for such rows has."""
    from rlhf_ray.models.scratch import build_scratch
    from rlhf_ray.models.tokenizers import build_tokenizer

    tokenizer = build_tokenizer("bpe", [json.loads(line)[field] for line in lines], vocab_size=16_384)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    model = build_scratch("qwen2", vocab_size=len(tokenizer), hidden_size=32, layers=1, heads=2, max_length=2048)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _make_run(lines: list[str], count: int, field: str, folder: Path) -> Path:
    import yaml

    file, config = folder / f"{count}.jsonl", folder / f"{count}.yaml"
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = json.loads(lines[number % len(lines)])
            stream.write(json.dumps({**row, "number": number}) + "\n")
    config.write_text(yaml.safe_dump({
        "model": {"path": str(folder / "model")}, "rewards": [{"function": "math"}],
        "data": {"path": str(file), "field": field, "template": "chat", "eval_size": min(256, count // 2),
                 "cache_dir": str(folder / "cache")},
        "eval": {"size": min(256, count // 2)},
        "rollout": {"prompts_per_step": min(32, count - count // 2), "max_new_tokens": 64},
    }))  # fmt: skip
    return config


if __name__ == "__main__":
    main()
