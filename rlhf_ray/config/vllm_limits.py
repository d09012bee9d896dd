"""What vLLM can serve, checked before anything loads: it would say so itself only after starting for a minute.

Pure: of a model only its shape is needed, from the settings or from its config.json (`models/fits.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.config.schema import GeneratorConfig, RunConfig

# `CPUAttentionBackend.get_supported_head_sizes()` of vLLM 0.32 (v1/attention/backends/cpu_attn.py); a test compares.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

# Arguments of vLLM's engine that the run itself sets, on one device or the other. (max_num_seqs has a default.)
OWN_ENGINE_ARGS = frozenset({
    "model", "skip_tokenizer_init", "generation_config", "dtype", "seed", "max_model_len", "trust_remote_code",
    "tensor_parallel_size", "distributed_executor_backend", "enforce_eager", "use_tqdm_on_load", "logprobs_mode",
    "worker_extension_cls", "weight_transfer_config", "gpu_memory_utilization", "enable_sleep_mode",
    "kv_cache_memory_bytes", "enable_chunked_prefill", "max_num_batched_tokens",
})  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What vLLM is particular about; None: the model has no such thing, or keeps it elsewhere."""

    heads: int
    head_size: int | None = None
    kv_heads: int | None = None
    mlp: int | None = None
    layers: int | None = None  # of which every one keeps all keys and values


def generator_problems(config: RunConfig, device: str) -> list[str]:
    """Of a training run: whatever the settings alone show."""
    generator = config.generator
    if not generator.facts.limits_shapes:
        return []
    problems = engine_args_problems(generator)
    if config.executor == "local" and generator.tensor_parallel > 1 and config.sync.transport in ("auto", "in_process"):
        problems.append(
            f"generator.tensor_parallel={generator.tensor_parallel} with executor=local: weights are passed inside one "
            "process, and vLLM's workers would be processes of their own; set executor=ray, or "
            "generator.tensor_parallel=1"
        )
    kind, scratch = config.model.path, config.model.scratch
    if kind not in ("scratch:qwen2", "scratch:gpt2") or scratch.hidden_size % scratch.heads:
        return problems  # no attention, or no shape at all: refused elsewhere
    mlp = scratch.intermediate_size or scratch.hidden_size * (3 if kind == "scratch:qwen2" else 4)
    shape = Shape(scratch.heads, scratch.hidden_size // scratch.heads, scratch.heads, mlp, scratch.layers)
    longest = min(config.data.max_prompt_tokens + config.rollout.max_new_tokens, scratch.max_length)
    instead = "choose model.scratch.hidden_size and model.scratch.heads accordingly, or set generator.engine=hf"
    return problems + shape_problems(
        kind, shape, generator, device, longest=longest, bfloat16=config.dtype == "bfloat16", instead=instead
    )


def engine_args_problems(generator: GeneratorConfig) -> list[str]:
    """Arguments that would undo what the run's promises rest on."""
    taken = sorted(OWN_ENGINE_ARGS & generator.engine_args.keys())
    if not taken:
        return []
    return [
        f"generator.engine_args: {', '.join(taken)} is set by the run itself; drop it, or change the setting of the "
        "run that decides it"
    ]


def head_size_problems(model: str, size: int, instead: str, known: Sequence[int] = CPU_HEAD_SIZES) -> list[str]:
    """Of attention heads of this size on a CPU."""
    if size in known:
        return []
    return [
        f"vLLM on CPU cannot serve {model}: its attention heads have size {size}, and the kernels know "
        f"{', '.join(map(str, known))}; {instead}"
    ]


def shape_problems(
    model: str, shape: Shape, generator: GeneratorConfig, device: str, *, longest: int, bfloat16: bool, instead: str
) -> list[str]:
    """Of a model with this shape on vLLM.

    Args:
        device: cuda or cpu; `auto` contradicts nothing that depends on it.
        longest: tokens of the longest prompt and answer together.
        instead: what to do about a model that vLLM cannot serve.
    """
    problems, parts = [], generator.tensor_parallel
    if device == "cpu" and shape.head_size is not None:
        problems += head_size_problems(model, shape.head_size, instead)
    divided = {f"{shape.heads} attention heads": shape.heads}
    if shape.kv_heads is not None and parts % shape.kv_heads:  # fewer than parts: they are repeated
        divided[f"{shape.kv_heads} key and value heads"] = shape.kv_heads
    if shape.mlp is not None:
        divided[f"MLP width {shape.mlp}"] = shape.mlp
    problems += [
        f"generator.tensor_parallel={parts} does not divide the {what} of {model}, and each GPU gets an equal part; "
        "set it to a divisor, and use several generators (generator.count) for the other GPUs"
        for what, number in divided.items()
        if number % parts
    ]
    if device == "cpu" and None not in (shape.layers, shape.head_size, shape.kv_heads):
        each = 2 * shape.layers * max(1, shape.kv_heads // parts) * shape.head_size * (2 if bfloat16 else 4)
        need = longest * each / 2**30
        room = generator.kv_cache_gb_on_cpu
        if need > room:
            problems.append(
                f"generator.kv_cache_gb={room:g} does not hold one sequence: {longest} tokens of "
                f"{model} have {need:.2g} GiB of keys and values; raise it, or lower data.max_prompt_tokens or "
                "rollout.max_new_tokens"
            )
    return problems
