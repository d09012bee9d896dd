"""The local generator: a Hugging Face model that writes answers step by step, on CPU, MPS or one GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.roles import serving
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.decode_loop import DecodeLoop
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.sample import Sample
from rlhf_ray.sync.receiver import HFReceiver

_GIB = 2**30


class HFGenerator(HFReceiver):
    """Samples from a Transformers model: an `Engine` (roles/protocols.py), and a `Generator` on top of it.

    Weight transfer is inherited from `HFReceiver`. Where weights change while an answer is being written, what the
    model remembers of the row is computed anew, so that a token's log-probability is that of the version that drew it.

    Args:
        batch_size: most rows that are written side by side.
        kv_cache_gb: GiB that their keys and values may take; None: half of what a GPU has free, elsewhere no bound.
    """

    def __init__(
        self, model: PreTrainedModel, *, pad_token_id: int, batch_size: int = 1024, kv_cache_gb: float | None = None
    ) -> None:
        super().__init__(model)
        self.model = model.eval().requires_grad_(False)
        # The folder's own (a repetition penalty, other stop tokens, ...) would bend the distribution away from
        # the one that the learner computes.
        self.model.generation_config = GenerationConfig()
        self.pad_token_id = pad_token_id
        kv_bytes = None if kv_cache_gb is None else int(kv_cache_gb * _GIB)
        self._loop = DecodeLoop(self.model, pad_token_id=pad_token_id, rows=batch_size, kv_bytes=kv_bytes)

    @property
    def open(self) -> int:
        return self._loop.open

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """See `roles.protocols.Engine`."""
        self.require_whole("generate")
        self._loop.submit(requests, sampling)

    def collect(self) -> list[Sample]:
        """See `roles.protocols.Engine`."""
        self.require_whole("generate")
        samples: list[Sample] = []
        while self.open and not samples:
            samples = self._loop.step(self.version)
        return samples

    def cancel(self, sample_ids: Sequence[int]) -> None:
        """See `roles.protocols.Engine`."""
        self._loop.cancel(sample_ids)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        super().finish_weight_update(weight_version)
        self._loop.reread()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, streamer: BaseStreamer | None = None
    ) -> Batch:
        """Sample one completion a request, in request order. See `roles.protocols.Generator`.

        `streamer` (for one request) hears of the prompt's tokens and of each token as soon as it is sampled.
        """
        self.require_whole("generate")
        if not requests:
            raise ValueError("generate: no requests; give at least one")
        if streamer is None:
            return serving.generate(self, requests, sampling, self.pad_token_id)
        streamer.put(torch.tensor([requests[0].token_ids]))
        self._loop.on_tokens = lambda tokens: streamer.put(torch.tensor(tokens))
        try:
            batch = serving.generate(self, requests, sampling, self.pad_token_id)
        finally:
            self._loop.on_tokens = None
        streamer.end()
        return batch

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
        """Give the memory of keys and values back; the model stays, for it is small or alone."""
        self._loop.free()

    def wake(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        self._loop.free()
        super().close()
