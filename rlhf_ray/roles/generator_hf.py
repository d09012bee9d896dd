"""Rollouts with Hugging Face `generate`: CPU, MPS or one GPU, and every model Transformers can load."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.batch import Batch, build_batch
from rlhf_ray.models.lstm import LstmState
from rlhf_ray.roles.given import with_given_answers
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.sync.hf_receiver import HFReceiver


class HFGenerator(HFReceiver):
    """Samples from a Transformers model.

    Rows are generated in fixed batches of `batch_size`, so that what is sampled does not depend on how many
    generators share the work. Weight transfer is inherited from `HFReceiver`.
    """

    def __init__(self, model: PreTrainedModel, *, pad_token_id: int, batch_size: int = 1024) -> None:
        super().__init__(model)
        self.model = model.eval().requires_grad_(False)
        # The folder's own (a repetition penalty, other stop tokens, ...) would bend the distribution away from
        # the one that the learner computes.
        self.model.generation_config = GenerationConfig()
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.inputs = inspect.signature(model.forward).parameters.keys()
        self.can_prefill = self.inputs >= {"past_key_values", "logits_to_keep"}

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, streamer: BaseStreamer | None = None
    ) -> Batch:
        """Sample one completion a request, in request order. See `roles.protocols.Generator`.

        `streamer` (for one request) hears of the prompt's tokens and of each token as soon as it is sampled.
        """
        self.require_whole("generate")
        if not requests:
            raise ValueError("generate: no requests; give at least one")
        chunks = [requests[i : i + self.batch_size] for i in range(0, len(requests), self.batch_size)]
        sample = partial(self._generate_chunk, streamer=streamer)
        return Batch.cat(
            [with_given_answers(sample, chunk, sampling, self.pad_token_id) for chunk in chunks]
        )

    @torch.no_grad()
    def _generate_chunk(
        self, requests: Sequence[Request], sampling: Sampling, streamer: BaseStreamer | None = None
    ) -> Batch:
        tokens, mask, cache = self._prefill([tuple(r.token_ids) for r in requests])
        sampler = KeyedSampler(
            [r.seed for r in requests],
            sampling,
            prompt_length=tokens.shape[1],
            temperatures=[sampling.temperature if r.temperature is None else r.temperature for r in requests],
        )
        output = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # `sampler` draws the token; greedy search then takes it
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList([sampler]),
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=self.pad_token_id,
            streamer=streamer,
        )
        sampled = output[:, tokens.shape[1] :].cpu()
        logps = torch.stack(sampler.logps, dim=1).cpu()
        lengths, truncated = _completion_lengths(sampled, sampling)
        return build_batch(
            requests,
            [row[:n] for row, n in zip(sampled.tolist(), lengths, strict=True)],
            [row[:n] for row, n in zip(logps.tolist(), lengths, strict=True)],
            truncated=truncated,
            weight_version=self.version,
            pad_token_id=self.pad_token_id,
        )

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token at temperature 1; the first entry of a sequence is 0."""
        self.require_whole("give log-probabilities")
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.long) for row in tokens], batch_first=True, padding_value=self.pad_token_id
        )
        mask = torch.arange(padded.shape[1])[None, :] < torch.tensor([len(row) for row in tokens])[:, None]
        device = self.model.device
        logits = self.model(input_ids=padded.to(device), attention_mask=mask.long().to(device)).logits
        logp = token_logprobs(logits, padded.to(device)).cpu()
        return [logp[i, : len(row)].tolist() for i, row in enumerate(tokens)]

    def sleep(self) -> None:
        """Nothing to give back: the model is small or alone."""

    def wake(self) -> None:
        """Nothing to undo."""

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor, Any]:
        """Tokens and mask of every row, and the cache of all but the last token, where rows share their prompts.

        A group's prompt runs through the model once, and all of its members go on from there. A model with a state of
        its own kind (Mamba, MiniMax) begins each row at its prompt, as `generate` does by itself.
        """
        distinct = list(dict.fromkeys(prompts))
        tokens, mask = self._left_pad(distinct)
        place = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([place[prompt] for prompt in prompts], device=tokens.device)
        cache = None
        if self.can_prefill and len(distinct) < len(prompts) and tokens.shape[1] > 1:
            known = {"input_ids": tokens[:, :-1], "attention_mask": mask[:, :-1]}
            if "position_ids" in self.inputs:
                known["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
            cache = getattr(self.model(**known, use_cache=True, logits_to_keep=1), "past_key_values", None)
            if type(cache) in (DynamicCache, LstmState):
                cache.reorder_cache(rows)
            else:
                cache = None
        return tokens[rows], mask[rows], cache

    def _left_pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(prompt) for prompt in prompts)
        rows = [[self.pad_token_id] * (width - len(p)) + list(p) for p in prompts]
        masks = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        device = self.model.device
        return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


class KeyedSampler(LogitsProcessor):
    """Draws token t of row i with the uniform number u(seed_i, t) by inverting the cumulative distribution.

    The draw depends on the row's own seed and its own logits only: not on its neighbours, on the device or on
    what was sampled before in this process. Collects the log-probability of each drawn token.

    `temperatures` are those of the rows, where they differ from `sampling`; at 0 a row is greedy.
    """

    def __init__(
        self, seeds: Sequence[int], sampling: Sampling, prompt_length: int, temperatures: Sequence[float] | None = None
    ) -> None:
        self.seed_B = torch.tensor([seed & _MASK63 for seed in seeds], dtype=torch.long)
        self.prompt_length = prompt_length
        own = list(temperatures or [sampling.temperature] * len(seeds))
        self.greedy = max(own) == 0
        self.greedy_B = torch.tensor([temperature == 0 for temperature in own])
        self.logps: list[Tensor] = []
        self.warpers = LogitsProcessorList()
        if len(set(own)) > 1:
            self.warpers.append(RowTemperatures(own))
        elif own[0] not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(own[0]))
        if sampling.top_k > 0:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p_BV = self.warpers(input_ids, scores.float()).softmax(-1)
        if self.greedy:
            token_B = p_BV.argmax(-1)
        else:
            u_B = keyed_uniform(self.seed_B, input_ids.shape[1] - self.prompt_length)
            u_B = u_B.float().to(scores.device)  # MPS has no float64
            token_B = sample_by_inversion(p_BV, u_B)
            if self.greedy_B.any():
                token_B = torch.where(self.greedy_B.to(token_B.device), p_BV.argmax(-1), token_B)
        self.logps.append(p_BV.gather(-1, token_B[:, None])[:, 0].log())
        return scores.scatter(-1, token_B[:, None], float("inf"))


class RowTemperatures(LogitsProcessor):
    """Divides each row's logits by its own temperature; a greedy row's stay as they are."""

    def __init__(self, temperatures: Sequence[float]) -> None:
        self.scale_B1 = torch.tensor([temperature or 1.0 for temperature in temperatures])[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.scale_B1.to(scores.device)


def sample_by_inversion(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The token whose slice of the cumulative distribution contains u. [B] int64"""
    # Float32 sums of a 150k vocabulary end near 1, not at 1: scale u by the real end, never point past it.
    cdf_BV = p_BV.cumsum(-1)
    target_B1 = (u_B.to(cdf_BV.dtype) * cdf_BV[:, -1])[:, None]
    token_B = torch.searchsorted(cdf_BV, target_B1, right=True)[:, 0].clamp(max=p_BV.shape[-1] - 1)
    # Rounding could land on a token that top-p removed (probability 0): take the likeliest instead.
    impossible_B = p_BV.gather(-1, token_B[:, None])[:, 0] == 0
    return torch.where(impossible_B, p_BV.argmax(-1), token_B) if impossible_B.any() else token_B


_MASK63 = (1 << 63) - 1


def _mul(x: Tensor, factor: int) -> Tensor:
    """int64 product modulo 2^64, factor given as unsigned."""
    return x * (factor - (1 << 64) if factor >= 1 << 63 else factor)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keyed_uniform(seed_B: Tensor, position: int) -> Tensor:
    """Uniform numbers in (0, 1), a pure function of (seed, position): SplitMix64 (Steele et al., 2014). [B] float64"""
    x = seed_B + _mul(torch.full_like(seed_B, position + 1), 0x9E3779B97F4A7C15)
    for _ in range(2):  # neighbouring seeds and positions differ in few bits: mix twice
        x = _mul(x ^ _shift(x, 30), 0xBF58476D1CE4E5B9)
        x = _mul(x ^ _shift(x, 27), 0x94D049BB133111EB)
        x = x ^ _shift(x, 31)
    return (_shift(x, 11).double() + 0.5) / (1 << 53)


def _completion_lengths(sampled: Tensor, sampling: Sampling) -> tuple[list[int], list[bool]]:
    """Tokens of each completion up to and with the first stop token; True where there is none."""
    stop = torch.zeros_like(sampled, dtype=torch.bool)
    for token in sampling.stop_token_ids:
        stop |= sampled == token
    stopped = stop.any(1)
    lengths = torch.where(stopped, stop.int().argmax(1) + 1, sampled.shape[1])
    return lengths.tolist(), (~stopped).tolist()
