"""What the engines really hold, against the formulas of `rlhf-ray plan`: every byte that torch's CPU allocator gave.

    python benchmarks/plan_memory.py                    # every case, each in processes of its own: a table
    python benchmarks/plan_memory.py --cases torch      # those whose name begins so

A small Qwen2 takes two optimiser steps of two micro-batches each; the profiler of torch sees each allocation, and the
peak is the largest sum. A GPU's own contexts, NCCL's buffers and what the allocator wastes are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.config.schema import LearnerConfig
from rlhf_ray.models.architecture import Architecture
from rlhf_ray.models.memory import activation_bytes, buffer_bytes, train_bytes
from rlhf_ray.models.size import size_of

ROWS, LENGTH = 8, 128
SHAPE = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 768, "max_position_embeddings": LENGTH}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    f"{name} {dtype}{' checkpointing' if checkpointing else ''}": {
        **settings, "dtype": dtype, "gradient_checkpointing": checkpointing,
    }
    for name, settings in {
        "torch": {"engine": "torch"},
        **{f"ZeRO-{stage} x 2": {"engine": "deepspeed", "zero_stage": stage, "world_size": 2} for stage in range(4)},
    }.items()
    for dtype in ("float32", "bfloat16")
    for checkpointing in ((False, True) if name in ("torch", "ZeRO-3 x 2") else (False,))
}  # fmt: skip


def planned(case: dict[str, Any], shape: dict[str, int] = SHAPE, rows: int = ROWS, length: int = LENGTH) -> int:
    """Bytes of one rank by the formulas."""
    dtype, settings = getattr(torch, case["dtype"]), learner_of(case)
    with torch.device("meta"):
        size = size_of(Qwen2ForCausalLM(Qwen2Config(**shape)))
    architecture = Architecture.of(Qwen2Config(**shape), "Qwen2")
    activations = activation_bytes(
        architecture, rows * length, length, dtype.itemsize,
        checkpointing=settings.gradient_checkpointing, device="cpu",
    )  # fmt: skip
    return train_bytes(size, settings, dtype) + buffer_bytes(size, settings, dtype) + activations


def learner_of(case: dict[str, Any]) -> LearnerConfig:
    return LearnerConfig(**{name: value for name, value in case.items() if name != "dtype"})


def measured(case: dict[str, Any], shape: dict[str, int] = SHAPE, rows: int = ROWS, length: int = LENGTH) -> int:
    """Bytes at the peak of one rank: this process."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(case, shape, rows, length)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((one for one in events if one.get("name") == "[memory]"), key=lambda one: one["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _train(case: dict[str, Any], shape: dict[str, int], rows: int, length: int) -> None:
    settings = learner_of(case)
    options: dict[str, Any] = {
        "dtype": getattr(torch, case["dtype"]), "gradient_checkpointing": settings.gradient_checkpointing,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    if settings.engine == "torch":
        from rlhf_ray.models.torch_engine import TorchEngine

        engine: Any = TorchEngine(model, **options)
    else:
        from rlhf_ray.models.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(model, zero_stage=settings.zero_stage, offload=settings.offload, **options)
    tokens_BT = torch.randint(0, shape["vocab_size"], (rows, length))
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[0, length // 2 :] = 0  # padding: without it attention needs no mask
    for _ in range(2):
        for last in (False, True):
            logits_BTV = engine(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits
            logp_BT = token_logprobs(logits_BTV, tokens_BT)
            del logits_BTV
            engine.backward(logp_BT.mean(), last=last)
            del logp_BT
        engine.step(1e-4)
    engine.close()


def in_processes(name: str) -> int:
    """The largest peak of a case's ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = learner_of(CASES[name]).world_size
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", name], stdout=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{name}: failed")
    return max(int(answer.split()[-1]) for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="those whose name begins so")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(measured(CASES[arguments.rank]))
        return
    print("| case | measured, MiB | planned, MiB | ratio |\n| --- | --- | --- | --- |")
    for name, case in CASES.items():
        if name.startswith(arguments.cases):
            really, said = in_processes(name), planned(case)
            print(f"| {name} | {really / 2**20:.1f} | {said / 2**20:.1f} | {said / really:.2f} |", flush=True)


if __name__ == "__main__":
    main()
