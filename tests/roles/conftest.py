"""Tiny models and batches. Ids 0 and 1 are padding and EOS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import LearnerConfig
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.batch import Batch, build_batch
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.protocols import Request
from rlhf_ray.sync.sender import InProcessSender
from tests.steps import one_step

VOCAB = 11


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """A tiny model by kind; its logits are scaled up, so that an untrained one has opinions."""

    def make(kind: str = "qwen2", *, seed: int = 0, sharpness: float = 8.0, **shape: Any) -> PreTrainedModel:
        sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 32, "tie_embeddings": False, **shape}
        model = build_scratch(kind, vocab_size=VOCAB, seed=seed, **sizes)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(sharpness)
        return model

    return make


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    """A batch from (prompt, completion) token ids; `group` of them share a prompt id."""

    def make(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, group: int = 2, **columns: Any) -> Batch:
        requests = [Request(i // group, i, tuple(p), seed=i, columns={"prompt": "?"}) for i, (p, _) in enumerate(rows)]
        completions = [list(c) for _, c in rows]
        logps = [[-1.0] * len(c) for c in completions]
        batch = build_batch(requests, completions, logps, truncated=[False] * len(rows), weight_version=0)
        return batch.replace(**columns)

    return make


@pytest.fixture
def ragged(batch_of) -> Batch:
    """Six rows in three groups, every prompt and completion of another length."""
    return batch_of([
        ((2, 3), (4, 5, 6, 1)), ((2, 3), (7, 1)),
        ((5,), (8, 9, 2, 3, 4, 1)), ((5,), (3,)),
        ((6, 7, 8, 9), (10, 2, 1)), ((6, 7, 8, 9), (4, 4, 4, 4, 4)),
    ])  # fmt: skip


@pytest.fixture
def with_advantages() -> Callable[[Batch], Batch]:
    """One advantage a row: 1, -1, 0.5, -0.5, 2, -2, ..."""

    def add(batch: Batch) -> Batch:
        adv_B = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])[: len(batch)]
        return batch.replace(advantages=adv_B[:, None] * batch.response_mask)

    return add


@pytest.fixture
def learner_of() -> Callable[..., Learner]:
    def make(
        model: torch.nn.Module,
        algorithm: dict[str, Any] | None = None,
        *,
        temperature: float = 1.0,
        engine: Any = None,
        max_grad_norm: float = 1e9,
        **settings: Any,
    ) -> Learner:
        config = LearnerConfig(**{"lr": 1e-2, "max_grad_norm": max_grad_norm, **settings})
        engine = engine or TorchEngine(model, betas=config.betas, max_grad_norm=config.max_grad_norm)
        return Learner(
            engine, config, AlgorithmConfig(**(algorithm or {})), tokenizer=None, temperature=temperature,
            max_new_tokens=8, sender=InProcessSender(capacity=1 << 20), seed=0, total_steps=10,
        )  # fmt: skip

    return make


def reference_logprobs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """[B, T] response log-probabilities, each row by itself, by plain log_softmax: differentiable."""
    rows = []
    for i in range(len(batch)):
        n = int(batch.lengths[i])
        tokens = batch.tokens[i : i + 1, :n]
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        logp = torch.log_softmax(logits.float() / temperature, -1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
        rows.append(torch.nn.functional.pad(logp, (1, batch.tokens.shape[1] - n)))
    return torch.stack(rows) * batch.response_mask


@pytest.fixture(name="reference_logprobs")
def _reference_logprobs() -> Callable[..., Tensor]:
    return reference_logprobs


class OneOfTwo:
    """Stands in for one of two ranks: keeps its losses apart, adds nothing up."""

    def __init__(self, model, rank: int) -> None:
        self.engine, self.rank, self.world_size = TorchEngine(model, max_grad_norm=1e9), rank, 2
        self.device, self.module, self.calls = self.engine.device, self.engine.module, []

    def __call__(self, **inputs):
        self.calls.append("forward")
        return self.engine(**inputs)

    def backward(self, loss, *, last):
        self.calls.append(f"backward{' last' if last else ''}")
        self.engine.backward(loss, last=last)

    def step(self, lr, scale=1.0):
        self.calls.append("step")
        return 1.0

    def all_reduce(self, value, op="sum"):
        return value.clone()


@pytest.fixture
def one_of_two() -> type[OneOfTwo]:
    return OneOfTwo


def gradients_of(learner: Learner, batch: Batch, kl_coef: float = 0.0, waves: Sequence[Any] = ()) -> dict[str, Tensor]:
    """The gradient a step would end with; `waves`: of a streamed one, the rows of each wave."""
    kept: dict[str, Tensor] = {}

    def step(lr: float, scale: float = 1.0) -> float:
        named = learner.engine.module.named_parameters()
        kept.update({n: p.grad.clone() * scale for n, p in named if p.grad is not None})
        learner.engine.module.zero_grad()
        return 1.0

    learner.engine.step = step
    one_step(learner, batch, 0, kl_coef, waves=waves)
    return kept


@pytest.fixture(name="gradients_of")
def _gradients_of() -> Callable[..., dict[str, Tensor]]:
    return gradients_of
