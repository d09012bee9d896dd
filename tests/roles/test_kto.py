"""KTO on whole batches: numbers worked by hand, on a model that finds four tokens equally likely everywhere."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlhf_ray.config.supervised import DPOLossConfig
from rlhf_ray.data.examples import LabelledAnswer
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.roles.kto import KTO, KTOItem, KTOTrainer, mismatched

LN4 = math.log(4.0)


def answer(prompt: tuple[int, ...], ids: tuple[int, ...], good: bool = True) -> LabelledAnswer:
    return LabelledAnswer(prompt + ids, (False,) * len(prompt) + (True,) * len(ids), good=good)


def items(*examples: LabelledAnswer) -> list[KTOItem]:
    return [KTOItem(example, "train", place) for place, example in enumerate(examples)]


class EvenEngine:
    """Logits 0 for four tokens."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __call__(self, input_ids, **_):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))


EXAMPLES = [answer((3,), (2, 1)), answer((2, 2), (3, 3, 1), good=False), answer((1,), (2, 2, 2, 1))]


def trainer(config: DPOLossConfig, examples=EXAMPLES, max_length: int = 9) -> KTOTrainer:
    return KTOTrainer(
        EvenEngine(), KTO(0, config), {"train": examples}, tokens_per_microbatch=1000,
        tokenizer=build_tokenizer("char", ["ab"]), max_length=max_length,
    )  # fmt: skip


def evaluated(config: DPOLossConfig, ratios: dict[tuple[int, int], float]) -> dict[str, float]:
    """`ratios[a, p]`: log pi - log ref of the answer of row a after the prompt of row p."""
    made = trainer(config)
    lengths = [2, 3, 4]  # an even model's answer of n tokens has log-probability -n ln 4, whatever it follows
    made.set_reference({"train": [(a, p, -lengths[a] * LN4 - ratio) for (a, p), ratio in ratios.items()]})
    return made.evaluate("train").metrics


MATCHED = {(0, 0): 2.0, (1, 1): -1.0, (2, 2): 0.5}


def test_answers_are_measured_against_the_kl_of_their_batch():
    # z = (1 + 0 + 0.5) / 3 = 0.5; good answers: r - z = 1.5 and 0; the bad one: z - r = 1.5
    config = DPOLossConfig(kind="kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    metrics = evaluated(config, {**MATCHED, (2, 0): 1.0, (0, 1): 0.0, (1, 2): 0.5})
    sigmoid = 1 / (1 + math.exp(-0.75))
    assert metrics["loss"] == pytest.approx((2 * (1 - sigmoid) + 3 * (1 - sigmoid) + 2 * 0.5) / 3, rel=1e-5)
    assert metrics["kl"] == pytest.approx(0.5, rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * (2.0 + 0.5) / 2, rel=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(-0.5, rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.625 + 0.5, rel=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(-3 * LN4) and metrics["logps/rejected"] == pytest.approx(-3 * LN4)


def test_a_kl_below_0_counts_as_none():
    config = DPOLossConfig(kind="kto", beta=1.0)
    below = evaluated(config, {**MATCHED, (2, 0): -5.0, (0, 1): 0.0, (1, 2): 0.0})
    none = evaluated(config, {**MATCHED, (2, 0): 0.0, (0, 1): 0.0, (1, 2): 0.0})
    assert below == none and none["kl"] == 0


def test_no_gradient_goes_through_the_kl():
    """It is a number by the time an answer is measured; only the answers' own log-probabilities have a gradient."""
    objective = KTO(0, DPOLossConfig(kind="kto", beta=0.5))
    batch = objective.collate([KTOItem(EXAMPLES[0], "train", 0, reference_logp=-2 * LN4 - 2.0, kl=0.5)])
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    objective.measure(SimpleNamespace(logits=logits), batch)["loss"].sum().backward()
    # d loss / d r = -beta s (1 - s) at r - z = 1.5; a token's logit moves its own log-probability by 3/4.
    sigmoid = 1 / (1 + math.exp(-0.75))
    assert logits.grad[0, 0, 2].item() == pytest.approx(-0.5 * sigmoid * (1 - sigmoid) * 0.75, rel=1e-5)
    assert not batch.extra["kl"].requires_grad


def test_a_batch_of_one_kind_measures_that_kind():
    only_bad = [answer((3,), (2, 1), good=False), answer((2,), (1,), good=False)]
    made = trainer(DPOLossConfig(kind="kto"), only_bad)
    made.set_reference({"train": [(0, 0, -2 * LN4), (1, 1, -LN4), (0, 1, -2 * LN4), (1, 0, -LN4)]})
    metrics = made.evaluate("train").metrics
    assert metrics["loss"] == pytest.approx(0.5)
    assert "rewards/rejected" in metrics and not {"rewards/chosen", "logps/chosen", "rewards/margins"} & set(metrics)


def test_metrics_of_a_source_are_of_its_rows_and_of_the_kl_of_all():
    named = [replace(row, source=name) for row, name in zip(EXAMPLES, "xyx", strict=True)]
    made = trainer(DPOLossConfig(kind="kto"), named)
    triples = [(a, p, logp - 3.0 * (a == 0)) for a, p, logp in made.reference_logprobs()["train"]]
    made.set_reference({"train": triples})  # the first answer has become likelier, wherever it stands
    metrics = made.evaluate("train").metrics
    assert metrics["source/x/kl"] == metrics["source/y/kl"] == pytest.approx(1.0)
    assert metrics["source/x/rewards/chosen"] == pytest.approx(0.1 * 3.0 / 2) and metrics["source/x/count"] == 2
    assert metrics["source/y/loss"] == pytest.approx(1 - 1 / (1 + math.exp(-0.1)), rel=1e-5)


def places(pairs) -> list[tuple[int, int]]:
    return [(one.place, other.place) for one, other in pairs]


def test_each_prompt_meets_the_answer_before_it():
    assert places(mismatched(items(*EXAMPLES))) == [(2, 0), (0, 1), (1, 2)]


def test_answers_to_the_same_prompt_do_not_meet_it():
    a, b, c = (2,), (3,), (2, 2)
    pairs = items(answer(a, (1,)), answer(a, (3, 1)), answer(b, (1,)), answer(b, (2, 1)), answer(c, (1,)))
    assert places(mismatched(pairs)) == [(3, 0), (4, 1), (0, 2), (1, 3), (2, 4)], "two before"
    assert all(one.prompt != other.prompt for one, other in mismatched(pairs))
    # Three of four ask the same: any shift by one or three has two that meet, a shift by two has two as well.
    alike = items(answer(a, (1,)), answer(a, (2, 1)), answer(a, (3, 1)), answer(b, (1,)))
    assert places(mismatched(alike))[0] == (3, 0)
    assert places(mismatched(items(answer(a, (1,))))) == [(0, 0)], "alone"


def test_the_reference_is_asked_for_all_that_the_run_will_ask():
    made = trainer(DPOLossConfig(kind="kto"))
    found = made.reference_logprobs(batches=[[0, 2], [1, 0]], sample=2)["train"]
    # Each row itself; batches 0 2 and 1 0; the evaluation of rows 0 and 1.
    assert {(a, p) for a, p, _ in found} == {(0, 0), (1, 1), (2, 2), (0, 2), (2, 0), (0, 1), (1, 0)}
    assert {(a, p): logp for a, p, logp in found}[2, 0] == pytest.approx(-4 * LN4)
    made.set_reference({"train": found})
    metrics = made.evaluate("train", 2).metrics
    assert metrics["loss"] == pytest.approx(0.5) and metrics["kl"] == 0, "the policy is its own reference at the start"


def test_a_mismatched_sequence_is_cut_where_rows_are():
    made = trainer(DPOLossConfig(kind="kto"), [answer((3, 3, 3), (1,)), answer((2,), (2, 2, 1))], max_length=4)
    found = {(a, p): logp for a, p, logp in made.reference_logprobs(batches=[[0, 1]])["train"]}
    assert found[1, 0] == pytest.approx(-LN4) and found[0, 1] == pytest.approx(-LN4), "one token of three is left"
    assert found[1, 1] == pytest.approx(-3 * LN4)
