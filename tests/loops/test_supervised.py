"""The loop's simplest form, with a real model: the warm start of policies that begin from nothing."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.loops.supervised import Batches, warm_up
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.objectives import SFT
from rlhf_ray.roles.supervised import SupervisedTrainer

# (prompt, completion); the last one is plain text.
ROWS = [((2, 3), (4, 5, 1)), ((6,), (7, 1)), ((), (8, 9, 10, 1))]
EXAMPLES = [TokenizedExample((*p, *c), (False,) * len(p) + (True,) * len(c)) for p, c in ROWS]


@pytest.fixture
def trainer() -> SupervisedTrainer:
    model = build_scratch("qwen2", vocab_size=11, hidden_size=16, layers=1, heads=2, max_length=16)
    return SupervisedTrainer(
        TorchEngine(model), SFT(0), {"train": EXAMPLES}, tokens_per_microbatch=1000,
        tokenizer=build_tokenizer("char", ["abc"]),
    )  # fmt: skip


def test_the_loss_is_that_of_the_completions_alone(trainer):
    """8 of the 9 completion tokens are predicted: nothing stands before the first token of the third row."""
    total = 0.0
    for prompt, completion in ROWS:
        ids = torch.tensor([[*prompt, *completion]])
        logp = torch.log_softmax(trainer.engine(input_ids=ids).logits[0].float(), -1)
        for t in range(max(1, len(prompt)), ids.shape[1]):
            total -= float(logp[t - 1, ids[0, t]].detach())
    seen = []
    warm_up(trainer, Batches(3, 3, 0), steps=1, lr=1e-30, on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == [(1, pytest.approx(total / 8, rel=1e-5))]


def test_it_learns_at_a_rate_that_falls_to_a_tenth(trainer, monkeypatch):
    rates, seen, real = [], [], trainer.step
    monkeypatch.setattr(trainer, "step", lambda rows, lr: (rates.append(lr), real(rows, lr))[1])
    warm_up(trainer, Batches(3, 3, 0), steps=60, lr=2e-2, on_step=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == list(range(1, 61))
    assert seen[0][1] > 2.0 and seen[-1][1] < 0.1
    assert (rates[0], rates[30]) == pytest.approx((2e-2, 2e-2 * 0.55)) and rates[-1] == pytest.approx(2e-3, rel=0.2)


def test_it_ends_at_the_target_accuracy(trainer):
    """The share of answers that the model would write greedily, over four batches."""
    assert not any(written_greedily(trainer, example) for example in EXAMPLES), "by chance"
    steps = []
    warm_up(trainer, Batches(3, 3, 0), steps=200, lr=2e-2, target_accuracy=0.6,
            on_step=lambda step, _: steps.append(step))  # fmt: skip
    assert 4 < steps[-1] < 100
    # 2/3 is the first share at or above the target.
    assert sum(written_greedily(trainer, example) for example in EXAMPLES) >= 2


def written_greedily(trainer: SupervisedTrainer, example: TokenizedExample) -> bool:
    ids = torch.tensor([example.token_ids])
    greedy = trainer.engine(input_ids=ids).logits[0].argmax(-1).tolist()
    start = max(1, example.learned.index(True))
    return greedy[start - 1 : -1] == ids[0, start:].tolist()
