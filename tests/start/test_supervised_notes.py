from __future__ import annotations

import pytest

from rlhf_ray.config.supervised import DPOConfig, SFTConfig
from rlhf_ray.data.examples import LabelledAnswer, TokenizedExample, TokenizedPair
from rlhf_ray.start.supervised_notes import balance_of, notes_on_labels, notes_on_validation

MODEL = {"path": "scratch:gpt2", "tokenizer": {"path": "scratch:char"}}


def notes(held_out=4, steps=12, per_epoch=4, data=None, **evaluation):
    rows = {"path": "rows.jsonl", "eval_size": 4, **(data or {})}
    config = SFTConfig(model=MODEL, steps=steps, data=rows, eval=evaluation)
    return notes_on_validation(config, {"val": [None] * held_out}, per_epoch)


def test_fewer_held_out_rows_than_asked_for_are_said():
    assert notes() == []
    assert notes(held_out=3) == [
        "held out: 3 examples, fewer than data.eval_size=4, for the examples of one prompt go together"
    ]
    assert notes(held_out=3, data={"eval_path": "val.jsonl"}) == [
        "held out: 3 examples, fewer than data.eval_size=4, for val.jsonl has no more"
    ]
    assert notes(held_out=3, data={"eval_path": "val.jsonl", "eval_size": 0}) == [], "0: all there are"


# Validations after steps 4, 8 and 12; the first is the best so far, and after step 12 nothing is left to stop.
@pytest.mark.parametrize(
    ("patience", "every", "steps", "can"),
    [(1, 0, 12, True), (2, 0, 12, False), (2, 0, 13, True), (2, 3, 12, True), (3, 3, 12, False), (1, 12, 12, False)],
)
def test_a_run_too_short_to_stop_early_says_so(patience, every, steps, can):
    found = notes(steps=steps, patience=patience, every=every)
    assert (found == []) == can
    if not can:
        assert found[0].startswith(f"eval.patience={patience}: with a validation every {every or 4} of {steps} steps (")
        assert "in all) the run ends before it could stop early" in found[0]


def test_the_balance_of_pairs_is_in_learned_tokens():
    def example(answer):
        return TokenizedExample((7,) * (3 + answer), (False,) * 3 + (True,) * answer)

    balance = balance_of([TokenizedPair(example(4), example(2)), TokenizedPair(example(1), example(2))])
    assert (balance.longer, balance.chosen_mean, balance.rejected_mean, balance.unit) == (0.5, 2.5, 2.0, "tokens")
    assert balance_of([example(4)]) is None


# Of 3 good and 6 bad answers: the good ones count half, and twice as much restores the balance.
@pytest.mark.parametrize(("good", "bad", "weights", "expected"), [
    (3, 6, {}, "answers: 3 good, 6 bad; with these weights the good ones count 0.50 times as much as the bad ones, "
               "and 1 to 1.33 is usual: dpo.desirable_weight 2.00 to 2.67, or dpo.undesirable_weight 0.38 to 0.50"),
    (3, 6, {"desirable_weight": 2.0}, "answers: 3 good, 6 bad"),
    (3, 6, {"undesirable_weight": 0.4}, "answers: 3 good, 6 bad"),
    (4, 3, {}, "answers: 4 good, 3 bad"),
    (0, 2, {}, "answers: 0 good, 2 bad; kto compares the two kinds, and with one alone it pushes all answers one way"),
])  # fmt: skip
def test_good_and_bad_answers_are_counted(good, bad, weights, expected):
    config = DPOConfig(model=MODEL, data={"path": "rows.jsonl"}, dpo={"kind": "kto", **weights})
    rows = [LabelledAnswer((1, 2), (False, True), good=place < good) for place in range(good + bad)]
    assert notes_on_labels(config, rows) == [expected]
    assert notes_on_labels(DPOConfig(model=MODEL, data={"path": "rows.jsonl"}), rows) == []
