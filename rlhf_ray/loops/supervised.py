"""Supervised learning on (prompt, completion) token ids: the warm start of models that begin from nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.models.engine import TrainEngine


@dataclass(frozen=True)
class SupervisedExample:
    """The loss is taken on `completion` only, EOS included; an empty prompt makes it plain language modelling."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def train_supervised(
    engine: TrainEngine,
    examples: Sequence[SupervisedExample],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    target_accuracy: float | None = None,
    ignored_token: int | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train for at most `steps` optimiser steps; returns the mean loss of the last ten, in nats a token.

    The rate falls linearly to a tenth of `lr`. Ends early when `target_accuracy` of the completions of the last ten
    batches are what the model would write greedily: a loss says less, for models of equal loss differ in this by a
    half. Each epoch visits every example once, in an order drawn from `seed`. `ignored_token` is read but never
    learned: a model that has learned `<unk>` writes it.
    """
    order: list[int] = []
    losses: list[float] = []
    accuracies: list[float] = []
    for step in range(steps):
        while len(order) < batch_size:
            epoch = list(range(len(examples)))
            random.Random(f"{seed}/{step}").shuffle(epoch)
            order += epoch
        picked, order = order[:batch_size], order[batch_size:]
        loss, accuracy = _loss(engine, [examples[i] for i in picked], ignored_token)
        engine.backward(loss, last=True)
        engine.step(lr * (1 - 0.9 * step / steps))
        losses.append(float(loss.detach()))
        accuracies.append(accuracy)
        on_step(step + 1, losses[-1])
        if target_accuracy is not None and step >= 9 and fmean(accuracies[-10:]) >= target_accuracy:
            break
    return fmean(losses[-10:])


def _loss(
    engine: TrainEngine, examples: Sequence[SupervisedExample], ignored_token: int | None
) -> tuple[Tensor, float]:
    """The mean loss of the learned tokens, and the share of rows in which each of them is the likeliest."""
    width = max(len(e.prompt) + len(e.completion) for e in examples)
    tokens_BT = torch.zeros(len(examples), width, dtype=torch.long)
    mask_BT = torch.zeros(len(examples), width, dtype=torch.bool)
    loss_mask_BT = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.completion)
        tokens_BT[row, :end] = torch.tensor([*example.prompt, *example.completion])
        mask_BT[row, :end] = True
        loss_mask_BT[row, max(start, 1) : end] = True  # nothing predicts the first token of a row
    if ignored_token is not None:
        loss_mask_BT &= tokens_BT != ignored_token
    device = engine.device
    tokens_BT, loss_mask_BT = tokens_BT.to(device), loss_mask_BT.to(device)
    logits_BTV = engine(input_ids=tokens_BT, attention_mask=mask_BT.long().to(device), use_cache=False).logits
    logp_BT = token_logprobs(logits_BTV, tokens_BT)
    loss = -(logp_BT * loss_mask_BT).sum() / loss_mask_BT.sum().clamp(min=1)
    greedy_BT = logits_BTV.detach()[:, :-1].argmax(-1)
    exact_B = ((greedy_BT == tokens_BT[:, 1:]) | ~loss_mask_BT[:, 1:]).all(1)
    return loss, float(exact_B.float().mean())
