"""The frozen policy that the KL penalty measures against."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.forward import batched_logprobs
from rlhf_ray.roles.protocols import Learner
from rlhf_ray.roles.shared_prompts import PromptSharing


class Reference:
    """Log-probabilities under weights that never change."""

    def __init__(
        self, model: PreTrainedModel, *, temperature: float, tokens_per_microbatch: int, share_prompts: bool = False
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.temperature = temperature
        self.tokens_per_microbatch = tokens_per_microbatch
        self.sharing = PromptSharing.of(model) if share_prompts else None

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] float32, 0 outside the response; at the sampling temperature, like the learner's."""
        return batched_logprobs(
            self.model,
            batch,
            temperature=self.temperature,
            max_tokens=self.tokens_per_microbatch,
            device=self.model.device,
            sharing=self.sharing,
        )


class AdapterFreeReference:
    """The reference of a LoRA policy: the learner itself, without its adapter. No second copy of the weights."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def logprobs(self, batch: Batch) -> Tensor:
        """As `Reference.logprobs`."""
        return self.learner.reference_logprobs(batch)
