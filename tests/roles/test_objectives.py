"""What each objective takes the loss on, and what it says of it: numbers worked by hand on given logits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_ray.data.examples import LabelledText, TokenizedExample, TokenizedPair
from rlhf_ray.roles.objectives import SFT, BradleyTerry, Classification

VOCAB, PAD = 4, 0
LN2, LN3, LN4 = math.log(2.0), math.log(3.0), math.log(4.0)


def example(ids: tuple[int, ...], prompt: int) -> TokenizedExample:
    return TokenizedExample(ids, tuple(place >= prompt for place in range(len(ids))))


def pair(chosen: tuple[int, ...], rejected: tuple[int, ...], prompt: int = 1, margin: float = 0.0) -> TokenizedPair:
    return TokenizedPair(example(chosen, prompt), example(rejected, prompt), margin)


def even(tokens_BT: torch.Tensor) -> SimpleNamespace:
    """A model to which every token is equally likely: each costs ln 4."""
    return SimpleNamespace(logits=torch.zeros(*tokens_BT.shape, VOCAB))


def scores(*values: float) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.tensor(values)[:, None])


# ---- SFT ------------------------------------------------------------------------------------------------------


def test_sft_learns_the_answer_and_its_end_alone():
    items = [example((2, 3, 2, 1), prompt=2), example((3, 2, 1), prompt=2)]
    sft = SFT(PAD)
    batch = sft.collate(items)
    assert batch.tokens.tolist() == [[2, 3, 2, 1], [3, 2, 1, PAD]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, True, False]]
    measured = sft.measure(even(batch.tokens), batch)
    torch.testing.assert_close(measured["loss"], torch.tensor([2 * LN4, LN4]))
    assert measured["weight"].tolist() == [sft.weight(item) for item in items] == [2, 1]
    metrics = sft.metrics(measured)
    assert metrics["loss"] == pytest.approx(LN4) and metrics["perplexity"] == pytest.approx(4.0)


def test_a_prompts_logits_get_no_gradient():
    batch = SFT(PAD).collate([example((2, 3, 2, 1), prompt=2)])
    logits = torch.zeros(1, 4, VOCAB, requires_grad=True)
    SFT(PAD).measure(SimpleNamespace(logits=logits), batch)["loss"].sum().backward()
    # Position t predicts token t + 1: 1 predicts the answer, 2 its end.
    assert logits.grad.abs().sum(-1)[0].gt(0).tolist() == [False, True, True, False]


def test_plain_text_is_learned_but_for_its_first_token_and_unknown_words():
    text = example((3, 2, 3, 1), prompt=0)
    assert SFT(PAD).weight(text) == 3
    sft = SFT(PAD, ignored_token=3)
    batch = sft.collate([text])
    measured = sft.measure(even(batch.tokens), batch)
    assert sft.weight(text) == 2 and measured["weight"].tolist() == [2]
    torch.testing.assert_close(measured["loss"], torch.tensor([2 * LN4]))


def test_accuracy_counts_tokens_and_whole_answers():
    """The model always bets on token 2."""
    sft = SFT(PAD)
    batch = sft.collate([example((3, 2, 2), prompt=1), example((3, 2, 1), prompt=1)])
    logits = torch.zeros(2, 3, VOCAB)
    logits[..., 2] = 1.0
    metrics = sft.metrics(sft.measure(SimpleNamespace(logits=logits), batch))
    assert metrics["token_accuracy"] == pytest.approx(3 / 4) and metrics["exact_accuracy"] == pytest.approx(1 / 2)


# ---- reward model ---------------------------------------------------------------------------------------------


def test_bradley_terry_loss_and_metrics():
    items = [pair((2, 3), (2, 2, 2)), pair((2, 3), (2, 3, 3), margin=LN3)]
    bradley_terry = BradleyTerry(PAD)
    batch = bradley_terry.collate(items)
    # sigmoid(ln 3) = 3/4; the second pair is 2 ln 3 apart, of which the margin takes one.
    measured = bradley_terry.measure(scores(LN3, 2 * LN3, 0.0, 0.0), batch)
    torch.testing.assert_close(measured["loss"], torch.full((2,), math.log(4 / 3)))
    metrics = bradley_terry.metrics(measured)
    assert metrics["accuracy"] == 1.0 and metrics["margin"] == pytest.approx(1.5 * LN3)
    assert (metrics["min_reward"], metrics["max_reward"]) == pytest.approx((0.0, 2 * LN3))


def test_margins_are_scaled():
    item = [pair((2, 3), (2, 2, 2), margin=4 * LN3)]
    for scale, expected in ((0.25, math.log(4 / 3)), (0.0, math.log(10 / 9))):
        bradley_terry = BradleyTerry(PAD, margin_scale=scale)
        measured = bradley_terry.measure(scores(2 * LN3, 0.0), bradley_terry.collate(item))
        assert measured["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_report_knows_calibration_length_and_the_histogram():
    bradley_terry = BradleyTerry(PAD)
    batch = bradley_terry.collate([pair((2, 3), (2, 3, 3)), pair((2, 3), (2, 3, 3))])
    # The longer answer always scores higher, by ln 3: confidence 3/4, never right.
    metrics, details = bradley_terry.report(bradley_terry.measure(scores(0.0, 0.0, LN3, LN3), batch))
    assert metrics["accuracy"] == 0.0 and metrics["ece"] == pytest.approx(0.75)
    assert metrics["length_correlation"] == pytest.approx(1.0)
    histogram = details["score_histogram"]
    assert histogram["chosen"][0] == 2 and histogram["rejected"][-1] == 2
    assert len(histogram["edges"]) == len(histogram["chosen"]) + 1


# ---- classifier -----------------------------------------------------------------------------------------------


def test_classification():
    objective = Classification(PAD, ["bad", "good"])
    batch = objective.collate([LabelledText((2, 3), 1), LabelledText((3,), 0)])
    # Both texts look good, with probability 3/4.
    logits = torch.tensor([[0.0, LN3], [0.0, LN3]])
    metrics, details = objective.report(objective.measure(SimpleNamespace(logits=logits), batch))
    assert metrics["loss"] == pytest.approx((math.log(4 / 3) + LN4) / 2)
    assert metrics["accuracy"] == 0.5 and metrics["ece"] == pytest.approx(0.25)
    assert details == {"accuracy_by_label": {"bad": 0.0, "good": 1.0}}
