"""Answers from vLLM, written step by step: token ids in, token ids with their log-probabilities and versions out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rlhf_ray.config.schema import VLLM_MAX_TEMPERATURE
from rlhf_ray.errors import ConfigError, DataError, EngineError, RequestError, RlhfRayError, SyncError
from rlhf_ray.roles import serving, vllm_engine
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.sample import Sample
from rlhf_ray.sync.receiver import SyncSession


class VLLMGenerator:
    """An `Engine` and a `Generator`, both of `roles/protocols.py`. One thread calls it.

    Between two steps of its engine weights may change, while requests are open: what comes out before is the old
    weights', what comes out after the new ones', and keys and values of the old ones are computed anew.

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
        if transport == "in_process" and tensor_parallel_size > 1:
            raise ConfigError(
                f"sync.transport=in_process with generator.tensor_parallel={tensor_parallel_size}: vLLM's "
                "workers are then processes of their own; set sync.transport=nccl, cuda_ipc or shared_memory"
            )
        self.max_model_len = max_model_len
        self.pad_token_id = pad_token_id
        self.transport = transport
        self._asleep = False
        self._needs_weights = False
        self._session = SyncSession("vllm generator")
        self._open: dict[int, Request] = {}  # by sample_id
        self._ended: dict[int, Sample] = {}  # not yet collected
        self._failed: dict[int, str] = {}  # why, not yet told
        self._gone = ""  # why there is no engine any more
        settings = vllm_engine.settings_of(
            model, dtype=dtype, seed=seed, max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization, kv_cache_gb=kv_cache_gb, enforce_eager=enforce_eager,
            sleep_mode=sleep_mode, max_num_seqs=max_num_seqs, trust_remote_code=trust_remote_code,
            engine_args=engine_args or {},
        )  # fmt: skip
        self._sleeps = bool(settings.get("enable_sleep_mode"))
        self._llm = vllm_engine.start(settings, transport)
        vllm_engine.label_weights(self._llm, self.version)

    @property
    def version(self) -> int:
        return self._session.version

    # ------------------------------------------------------------ answers

    @property
    def open(self) -> int:
        """Requests that were submitted and neither cancelled nor handed out by `collect`."""
        return len(self._open) + len(self._ended) + len(self._failed)

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Take requests on, all of them or, where one is refused, none.

        `Sample.logprobs` will be of the distribution sampled from (after temperature, top-p and top-k). Raises
        DataError for an empty or too long prompt, ConfigError for a temperature that vLLM does not know, RlhfRayError
        for a sample_id that is open already, SyncError after a failed sync, EngineError if the engine is dead.
        """
        self._require_ready("take requests")
        self._check_prompts([request.token_ids for request in requests], sampling.max_new_tokens)
        ids = {request.sample_id for request in requests}
        if len(ids) < len(requests) or ids & (self._open.keys() | self._ended.keys() | self._failed.keys()):
            raise RlhfRayError("vllm generator: two open requests have the same sample_id; give each its own")
        temperatures = [sampling.temperature if r.temperature is None else r.temperature for r in requests]
        if requests and not 0.0 <= min(temperatures) <= max(temperatures) <= VLLM_MAX_TEMPERATURE:
            raise ConfigError(
                f"generator.engine=vllm samples at temperatures from 0 to {VLLM_MAX_TEMPERATURE}, not "
                f"{max(temperatures)}; change rollout.temperature or set generator.engine=hf"
            )
        try:
            for request, temperature in zip(requests, temperatures, strict=True):
                self._open[request.sample_id] = request
                params = vllm_engine.writing(sampling, request.seed, temperature)
                self._add(str(request.sample_id), request.token_ids, params)
        except BaseException:
            self.cancel([*ids])
            raise

    def collect(self) -> list[Sample]:
        """Run the engine until a request ends; all that ended with that step.

        Raises RequestError if requests failed, while all others go on; EngineError if the engine died; SyncError
        after a failed sync.
        """
        self._require_ready("generate")
        while self._open and not self._ended and not self._failed:
            for output in self._step():
                self._take(output)
        if self._failed:
            failed, self._failed = self._failed, {}
            first, reason = next(iter(failed.items()))
            raise RequestError(
                f"vllm generator: {len(failed)} requests failed in their engine, the first of them sample {first} with "
                f"finish_reason={reason}; submit them again",
                tuple(failed),
            )
        ended, self._ended = self._ended, {}
        return list(ended.values())

    def cancel(self, sample_ids: Sequence[int]) -> None:
        """Drop these requests and what has been written of them; those that are not open are passed over."""
        running = [str(sample_id) for sample_id in sample_ids if self._open.pop(sample_id, None)]
        for sample_id in sample_ids:
            self._ended.pop(sample_id, None)
            self._failed.pop(sample_id, None)
        self._abort(running)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        """One row a request, in order; see `submit` and `collect` for what is raised."""
        self._require_ready("generate")
        if not requests:
            raise DataError("generate: no requests; ask for at least one completion")
        return serving.generate(self, requests, sampling, self.pad_token_id)

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it, at temperature 1; each row's first entry is 0.

        The same weights compute all rows. Answers that are open are written on meanwhile.
        """
        self._require_ready("compute log-probabilities")
        self._check_prompts(tokens, 1)  # vLLM always samples at least one token
        rows = {f"row {index}": row for index, row in enumerate(tokens)}
        found: dict[str, list[Any]] = {}
        try:
            for name, row in rows.items():
                self._add(name, row, vllm_engine.scoring())
            while len(found) < len(rows):
                for output in self._step():
                    if output.request_id in rows:
                        found[output.request_id] = output.prompt_logprobs
                    else:
                        self._take(output)
        except BaseException:
            self._abort([*rows])
            raise
        return [
            [0.0 if of is None else of[token].logprob for token, of in zip(row, found[name], strict=True)]
            for name, row in rows.items()
        ]

    def _add(self, name: str, tokens: Sequence[int], params: Any) -> None:
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(tokens)}, params)

    def _abort(self, names: Sequence[str]) -> None:
        if names and not self._gone:
            self._llm.llm_engine.abort_request(list(names))

    def _step(self) -> list[Any]:
        """Run one step of the engine; what ended with it."""
        engine = self._llm.llm_engine
        try:
            if not engine.has_unfinished_requests():
                raise RuntimeError("it no longer knows its requests")
            return engine.step()
        except Exception as error:
            # In the middle of a step it has planned what it will never do: it cannot go on, whatever the reason.
            self._gone = f"died of {type(error).__name__}: {error}"
            raise self._lost("go on") from error

    def _take(self, output: Any) -> None:
        """An answer that has ended."""
        (answer,), request = output.outputs, self._open.pop(int(output.request_id))
        if answer.finish_reason not in ("stop", "length"):
            self._failed[request.sample_id] = answer.finish_reason
            return
        logprobs = [of[token].logprob for token, of in zip(answer.token_ids, answer.logprobs, strict=True)]
        self._ended[request.sample_id] = Sample.answer(
            request.prompt_id, request.sample_id, request.token_ids, answer.token_ids, logprobs,
            vllm_engine.versions_of(answer, self.version), answer.finish_reason,
        )  # fmt: skip

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

    def _lost(self, action: str) -> EngineError:
        lost = f", and {self.open} open requests with it" if self.open else ""
        return EngineError(f"vllm generator: cannot {action}: its engine {self._gone}{lost}; replace this generator")

    def _require_ready(self, action: str) -> None:
        if self._gone:
            raise self._lost(action)
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
        if self._open and not vllm_engine.tells_versions():
            raise RlhfRayError(
                f"vllm generator: {len(self._open)} requests are open, and this vLLM does not tell which weights wrote "
                "a token; collect or cancel them before a sync, or install vLLM 0.32"
            )
        if self._session.state == "updating":
            self._give_up()
        self._session.start()
        with self._failing():
            self._llm.start_weight_update()

    def _give_up(self) -> None:
        """End an update whose sender was lost: vLLM begins no other before, and holds half of it until the next."""
        ending = vllm_engine.given_up(self.transport)
        if ending is None:
            raise self._session.fail(f"the sender of one by {self.transport} was lost, and vLLM waits for the rest")
        with self._failing():
            self._llm.update_weights({"update_info": ending})
            self._llm.finish_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._session.receive(update_info)
        with self._failing():
            self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._session.check_complete()
        with self._failing():
            self._llm.finish_weight_update()
            # Finishing does not clear it: cached keys and values of the old weights would be read silently. Those of
            # running requests are cleared too, and computed anew in the next step.
            cleared = self._llm.reset_prefix_cache(reset_running_requests=bool(self._open))
        if not cleared:
            raise self._session.fail("vLLM did not reset its prefix cache")
        self._session.finish(weight_version)
        with self._failing():
            vllm_engine.label_weights(self._llm, self.version)
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
        waking. Nothing happens on CPU or without `sleep_mode`. Raises RlhfRayError if requests are open."""
        if self.open:
            # vLLM would drop them.
            raise RlhfRayError(f"vllm generator: cannot sleep with {self.open} open requests; collect or cancel them")
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
        if self._llm is not None:
            llm, self._llm, self._gone = self._llm, None, self._gone or "was closed"
            vllm_engine.shut_down(llm)
