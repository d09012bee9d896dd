"""The supervised trainer in one process: how it splits a batch changes nothing, and what is frozen stays as it was."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from rlhf_ray.config.supervised import DPOLossConfig
from rlhf_ray.data.examples import LabelledAnswer, LabelledText, TokenizedExample, TokenizedPair
from rlhf_ray.errors import DivergenceError
from rlhf_ray.models.classifiers import freeze_layers
from rlhf_ray.models.scratch import build_scratch, build_scratch_classifier
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.kto import KTO, KTOTrainer
from rlhf_ray.roles.objectives import SFT, BradleyTerry, Classification
from rlhf_ray.roles.preferences import DPO, ReferenceFree
from rlhf_ray.roles.supervised import SupervisedTrainer

SHAPE = {"vocab_size": 11, "hidden_size": 16, "layers": 2, "heads": 2, "max_length": 16}


def example(*ids: int, prompt: int = 1) -> TokenizedExample:
    return TokenizedExample(ids, tuple(place >= prompt for place in range(len(ids))))


TEXTS = [example(2, 3, 1), example(4, 5, 6, 7, 8, 1), example(9, 1), example(3, 3, 3, 3, 1), example(10, 2, 7, 1)]
PAIRS = [
    TokenizedPair(example(2, 3, 1), example(2, 4, 4, 4, 1), margin=0.5),
    TokenizedPair(example(5, 6, 7, 8, 9, 1), example(5, 1)),
    TokenizedPair(example(6, 7, 1), example(6, 8, 1)),
]
ANSWERS = [LabelledAnswer(row.token_ids, row.learned, good=place % 2 == 0) for place, row in enumerate(TEXTS)]
LABELLED = [LabelledText((2, 3, 4), 0), LabelledText((5, 6, 7, 8, 9), 1), LabelledText((10,), 1)]


def network(kind: str) -> torch.nn.Module:
    if kind in ("sft", "dpo", "kto", "simpo", "orpo"):
        return build_scratch("qwen2", **SHAPE)
    labels = ["score"] if kind == "rm" else ["bad", "good"]
    return build_scratch_classifier("qwen2" if kind == "rm" else "bert", labels=labels, **SHAPE)


def trainer(kind: str, budget: int = 10_000, model: torch.nn.Module | None = None) -> SupervisedTrainer:
    objective, items = {
        "sft": (SFT(0), TEXTS),
        "rm": (BradleyTerry(0), PAIRS),
        "dpo": (DPO(0, DPOLossConfig(beta=0.5)), PAIRS),
        "kto": (KTO(0, DPOLossConfig(kind="kto", beta=0.5)), ANSWERS),
        "simpo": (ReferenceFree(0, DPOLossConfig(kind="simpo")), PAIRS),
        "orpo": (ReferenceFree(0, DPOLossConfig(kind="orpo")), PAIRS),
        "classifier": (Classification(0, ["bad", "good"]), LABELLED),
    }[kind]
    engine = TorchEngine(network(kind) if model is None else model, max_grad_norm=1e9)
    make = functools.partial(KTOTrainer, max_length=16) if kind == "kto" else SupervisedTrainer
    made = make(
        engine, objective, {"train": list(items), "val": list(items)}, tokens_per_microbatch=budget,
        tokenizer=build_tokenizer("char", ["abcdefgh"]),
    )  # fmt: skip
    if kind in ("dpo", "kto"):
        made.set_reference(made.reference_logprobs(batches=[range(len(items))]))
    return made


KINDS = ["sft", "rm", "dpo", "kto", "simpo", "orpo", "classifier"]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing(kind):
    """One forward pass over everything, or one for each item: the same metrics, gradient norm and weights."""
    whole, pieces = trainer(kind), trainer(kind, budget=1)
    rows = list(range(len(whole.splits["train"])))
    for _ in range(3):
        one, other = (made.step(rows, lr=1e-2) for made in (whole, pieces))
        names = [name for name in one if not name.startswith("perf/")]
        assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, abs=1e-5)
        assert one["grad_norm"] > 0 and one["skipped_steps"] == 0
    for a, b in zip(whole.engine.module.parameters(), pieces.engine.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert pieces.step(rows, 0.0)["perf/padding_frac"] <= whole.step(rows, 0.0)["perf/padding_frac"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_says_so(kind):
    made = trainer(kind)
    rows = list(range(len(made.splits["train"])))
    before = made.evaluate("val").metrics["loss"]
    first = made.step(rows, lr=0.0)["loss"]
    assert first == pytest.approx(before, rel=1e-5), "a step and an evaluation measure alike"
    for _ in range(30):
        made.step(rows, lr=1e-2)
    assert made.evaluate("val").metrics["loss"] < before / 2


def test_the_loss_of_a_batch_is_a_mean_over_its_tokens_not_over_its_rows():
    made = trainer("sft")
    rows = [0, 1]
    both = made.step(rows, lr=0.0)["loss"]
    alone = [made.step([row], lr=0.0)["loss"] for row in rows]
    assert both == pytest.approx((2 * alone[0] + 5 * alone[1]) / 7, rel=1e-5)


def test_dpo_starts_at_ln_2_from_its_own_reference():
    metrics = trainer("dpo").evaluate("val").metrics
    assert metrics["loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)


def test_another_reference_is_loaded_for_this_alone(tmp_path):
    other = build_scratch("qwen2", **SHAPE, seed=7)
    other.save_pretrained(tmp_path)
    made = trainer("dpo")
    made.splits = {"train": list(PAIRS)}
    own, foreign = made.reference_logprobs(), made.reference_logprobs(str(tmp_path))
    assert own["train"] != foreign["train"]
    ids = torch.tensor([[2, 3, 1]])
    logp = other(input_ids=ids).logits.log_softmax(-1)
    assert foreign["train"][0][0] == pytest.approx(float((logp[0, 0, 3] + logp[0, 1, 1]).detach()), rel=1e-5)


def test_frozen_layers_stay_as_they_were():
    model = network("classifier")
    frozen = freeze_layers(model, 1)
    assert frozen[0].startswith("bert.embeddings") and frozen[-1].startswith("bert.encoder.layer.0.")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = trainer("classifier", model=model)
    for _ in range(3):
        made.step([0, 1, 2], lr=1e-2)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved.isdisjoint(frozen)
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.1.output.dense.weight"} <= moved


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    made = trainer("sft")
    with torch.no_grad():
        made.engine.module.get_output_embeddings().weight[3] = math.inf
    before = [parameter.clone() for parameter in made.engine.module.parameters()]
    assert made.step([0], lr=1e-2)["skipped_steps"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, made.engine.module.parameters(), strict=True))
    with pytest.raises(DivergenceError, match="last 20 optimiser steps had no finite gradient"):
        for _ in range(19):
            made.step([0], lr=1e-2)


def test_samples_end_where_the_model_does():
    made = trainer("sft")
    for _ in range(60):
        made.step([0, 1, 2, 3, 4], lr=2e-2)
    # ids 2, 3, ... of the tokenizer are <unk>, "a", "b", ...
    assert made.sample([(4,)], max_new_tokens=8) == [made.tokenizer.decode([5, 6, 7, 8])]
    assert len(made.sample([(4, 5)] * 2, max_new_tokens=100)) == 2, "more than the model has positions for"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kto"])  # whose KL is that of all: test_kto.py
def test_metrics_of_each_source_are_those_of_its_own_rows(kind):
    made, alone = trainer(kind), trainer(kind)
    items = made.splits["train"]
    if kind == "dpo":
        pairs = [replace(item.pair, source="xyx"[i % 3]) for i, item in enumerate(items)]
        named = [replace(item, pair=pair) for item, pair in zip(items, pairs, strict=True)]
    else:
        named = [replace(item, source="xyx"[i % 3]) for i, item in enumerate(items)]
    made.splits["train"] = made.splits["val"] = named
    found = made.step(list(range(len(items))), lr=0.0)
    own = [i for i in range(len(items)) if i % 3 != 1]
    expected = alone.step(own, lr=0.0)
    names = [name.removeprefix("source/x/") for name in found if name.startswith("source/x/")]
    assert found["source/x/count"] == len(own) and found["source/y/count"] == len(items) - len(own)
    names.remove("count")
    assert "loss" in names
    assert {n: found[f"source/x/{n}"] for n in names} == pytest.approx({n: expected[n] for n in names}, abs=1e-6)
    judged = made.evaluate("val", limit=2).metrics
    assert (judged["source/x/count"], judged["source/y/count"]) == (1, 1), "a part of them has some of each"
    assert not any(name.startswith("source/") for name in alone.evaluate("val").metrics)
