"""Preferences of a policy: numbers worked by hand, on a model that finds four tokens equally likely everywhere."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_ray.config.supervised import DPOLossConfig
from rlhf_ray.data.examples import TokenizedExample, TokenizedPair
from rlhf_ray.roles.preferences import DPO, ReferencedPair, ReferenceFree

PAD, LN4 = 0, math.log(4.0)


def example(*ids: int) -> TokenizedExample:
    """The first token is the prompt."""
    return TokenizedExample(ids, (False, *[True] * (len(ids) - 1)))


PAIR = TokenizedPair(example(3, 2, 1), example(3, 2, 2, 1))


def even(tokens_BT: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.zeros(*tokens_BT.shape, 4))


def dpo_measured(config: DPOLossConfig, chosen_logp: float, rejected_logp: float) -> tuple[DPO, dict]:
    """An even model; the answers (2, 1) and (2, 2, 1) have log-probabilities -2 ln 4 and -3 ln 4."""
    dpo = DPO(PAD, config)
    batch = dpo.collate([ReferencedPair(PAIR, chosen_logp, rejected_logp)])
    return dpo, dpo.measure(even(batch.tokens), batch)


def test_dpo_sigmoid():
    # log-ratios: chosen +1, rejected -1, so h = 2; beta 0.5
    dpo, measured = dpo_measured(DPOLossConfig(beta=0.5), -2 * LN4 - 1, -3 * LN4 + 1)
    assert measured["loss"].item() == pytest.approx(math.log(1 + math.exp(-1.0)), rel=1e-5)
    metrics = dpo.metrics(measured)
    assert metrics["rewards/chosen"] == pytest.approx(0.5, rel=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(-0.5, rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(1.0, rel=1e-5) and metrics["rewards/accuracies"] == 1.0
    assert metrics["logps/chosen"] == pytest.approx(-2 * LN4) and metrics["logps/rejected"] == pytest.approx(-3 * LN4)


def test_label_smoothing_and_the_nll_term():
    config = DPOLossConfig(beta=0.5, label_smoothing=0.1, nll_weight=2.0)
    _, measured = dpo_measured(config, -2 * LN4 - 1, -3 * LN4 + 1)
    expected = 0.9 * math.log(1 + math.exp(-1.0)) + 0.1 * math.log(1 + math.exp(1.0)) + 2.0 * LN4
    assert measured["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_ipo_compares_means_over_tokens():
    # h = 1/2 - (-1/3) = 5/6, and 1/(2 beta) = 1
    dpo, measured = dpo_measured(DPOLossConfig(beta=0.5, kind="ipo"), -2 * LN4 - 1, -3 * LN4 + 1)
    assert measured["loss"].item() == pytest.approx((5 / 6 - 1) ** 2, rel=1e-4)
    assert dpo.metrics(measured)["rewards/chosen"] == pytest.approx(0.5, rel=1e-5), "of sums, as for sigmoid"


def test_the_nll_term_of_ipo_is_a_mean_over_tokens_too():
    plain = dpo_measured(DPOLossConfig(beta=0.5, kind="ipo"), 0.0, 0.0)[1]["loss"]
    more = dpo_measured(DPOLossConfig(beta=0.5, kind="ipo", nll_weight=1.0), 0.0, 0.0)[1]["loss"]
    assert (more - plain).item() == pytest.approx(LN4, rel=1e-5)


def reference_free(config: DPOLossConfig, logits_T4: list[list[float]] | None = None) -> tuple[ReferenceFree, dict]:
    """As `dpo_measured`; `logits_T4` of the chosen row make its tokens more or less likely."""
    objective = ReferenceFree(PAD, config)
    batch = objective.collate([PAIR])
    outputs = even(batch.tokens)
    if logits_T4 is not None:
        outputs.logits[0] = torch.tensor(logits_T4)
    return objective, objective.measure(outputs, batch)


# Of the chosen answer (2, 1) each token has probability 3/4, where the rejected one's have 1/4.
LIKELY = [[0.0, 0.0, 2 * math.log(3.0), 0.0], [0.0, 2 * math.log(3.0), 0.0, 0.0], [0.0] * 4, [0.0] * 4]


def test_simpo_compares_means_over_tokens():
    # mean log-probs ln 3/4 and ln 1/4: their difference is ln 3, and sigmoid(2 ln 3 - ln 3) = 3/4
    config = DPOLossConfig(kind="simpo", beta=2.0, gamma=math.log(3.0))
    objective, measured = reference_free(config, LIKELY)
    assert measured["loss"].item() == pytest.approx(math.log(4 / 3), rel=1e-5)
    metrics = objective.metrics(measured)
    assert metrics["rewards/margins"] == pytest.approx(2 * math.log(3.0), rel=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(math.log(0.75)) and metrics["logps/rejected"] == pytest.approx(-LN4)
    assert metrics["rewards/accuracies"] == 1.0


def test_orpo_learns_the_chosen_answer_and_the_odds():
    # odds 3 and 1/3, so their ratio is 9, and sigmoid(ln 9) = 9/10
    _, measured = reference_free(DPOLossConfig(kind="orpo", beta=0.5), LIKELY)
    assert measured["loss"].item() == pytest.approx(-math.log(0.75) - 0.5 * math.log(0.9), rel=1e-5)


def test_beta_is_what_each_paper_sets():
    assert [DPOLossConfig(kind=kind).beta for kind in ("sigmoid", "ipo", "simpo", "orpo")] == [0.1, 0.1, 2.0, 0.1]
    assert DPOLossConfig(kind="simpo", beta=0.3).beta == 0.3
