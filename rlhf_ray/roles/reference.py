"""The frozen policy that the KL penalty measures against."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ray.models.sharded import Sharded
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.division import Division, RankBatch
from rlhf_ray.roles.forward import over_shares, predict
from rlhf_ray.roles.protocols import Learner
from rlhf_ray.roles.shared_prompts import MicroBatch, PromptSharing


class Reference:
    """Log-probabilities under weights that never change."""

    def __init__(
        self, model: PreTrainedModel, *, temperature: float, tokens_per_microbatch: int, share_prompts: bool = False,
        sharded: Sharded | None = None,
    ) -> None:  # fmt: skip
        """`sharded`: where several ranks hold `model` together, what computes in its place. Each rank then has rows of
        its own, and every call is collective."""
        self.model = model.eval().requires_grad_(False)
        self.forward, self.device = sharded or model, sharded.device if sharded else model.device
        self.rank, ranks = (sharded.rank, sharded.world_size) if sharded else (0, 1)
        self.temperature = temperature
        sharing = PromptSharing.of(model) if share_prompts else None
        self.division = Division(1, tokens_per_microbatch, seed=0, ranks=ranks, sharing=sharing)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] float32, 0 outside the response; at the sampling temperature, like the learner's. A `RankBatch` says
        itself how its rows are divided into micro-batches."""
        if isinstance(batch, RankBatch):
            return over_shares(batch, batch.shares, self._logprobs)
        return over_shares(batch, [ranks[self.rank] for ranks in self.division.shares(batch.rows)], self._logprobs)

    def _logprobs(self, micro: MicroBatch) -> Tensor:
        return predict(self.forward, micro, temperature=self.temperature, device=self.device).logprobs()


class AdapterFreeReference:
    """The reference of a LoRA policy: the learner itself, without its adapter. No second copy of the weights."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def logprobs(self, batch: Batch) -> Tensor:
        """As `Reference.logprobs`."""
        return self.learner.reference_logprobs(batch)
