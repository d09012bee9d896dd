"""The script that compares two checkouts: what it lets pass, what it does not, and how a draw is forced."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.same_numbers import CLOSE, LISTENER, Report, compare_sample
from rlhf_ray.sample import Sample

BEFORE = {"start": 2, "tokens": [5, 6, 7, 8, 9], "logp": [-1.0, -2.0, -3.0], "truncated": False, "margins": [1, 0, 1]}


def compared(before, after) -> Report:
    report = Report()
    report.compare(before, after, "row")
    return report


@pytest.mark.parametrize(("before", "after"), [
    ({"loss": 0.5, "time/step": 1.0}, {"loss": 0.5 + 9e-7, "time/step": 2.0, "new": 3.0}),
    ([2000.0], [2000.001]), ([None, "a", True], [None, "a", True]), (math.nan, math.nan), (math.inf, math.inf),
], ids=["small", "large", "plain", "nan", "inf"])  # fmt: skip
def test_what_is_the_same(before, after):
    assert compared(before, after).problems == []


@pytest.mark.parametrize(("before", "after"), [
    ({"loss": 0.5}, {"loss": 0.5 + 1.1e-6}), ({"loss": 0.5}, {}), ([1.0], [1.0, 2.0]), (2000.0, 2000.003),
    (1.0, math.nan), (math.inf, 1.0), (None, 0.0), ("a", "b"), (True, False),
], ids=["loss", "missing", "longer", "large", "nan", "inf", "none", "text", "truth"])  # fmt: skip
def test_what_is_not(before, after):
    assert len(compared(before, after).problems) == 1


@pytest.mark.parametrize(("tokens", "problems", "exceptions"), [
    ([5, 6, 7, 8, 9], 0, 0),
    ([5, 6, 7, 4, 4], 0, 1),  # its draw was on the boundary
    ([5, 6, 4, 4, 4], 1, 0),  # its draw was far from it
    ([5, 6, 7, 8], 1, 0),  # stopped for no reason
], ids=["same", "close", "far", "short"])  # fmt: skip
def test_a_token_may_differ_where_its_draw_was_close(tokens, problems, exceptions):
    report = Report()
    after = {**BEFORE, "tokens": tokens, "logp": [-1.0, -2.0, -3.0][: len(tokens) - 2]}
    compare_sample("sample 1", BEFORE, after, report, 1e-6)
    assert (len(report.problems), len(report.exceptions)) == (problems, exceptions)


def test_log_probabilities_count_up_to_the_first_other_token():
    for logp, problems in (([-1.0, -9.0, -9.0], 0), ([-1.00001, -9.0, -9.0], 1)):
        report = Report()
        compare_sample("sample 1", BEFORE, {**BEFORE, "tokens": [5, 6, 7, 4, 4], "logp": logp}, report, 1e-6)
        assert len(report.problems) == problems


# ---- inside the processes ---------------------------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path, monkeypatch):
    """The listener as a run's process has it, with an answer of another checkout to sample 1 of version 3."""
    answer = {"sample": 1, "version": 3, "start": 2, "tokens": [5, 6, 7], "logp": [-0.5], "truncated": True}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    monkeypatch.setenv("SAME_NUMBERS_OUT", str(tmp_path))
    monkeypatch.setenv("SAME_NUMBERS_ANSWERS", str(tmp_path / "answers.jsonl"))
    monkeypatch.setattr("sys.meta_path", list(sys.meta_path))
    spec = importlib.util.spec_from_file_location("listener", LISTENER / "sitecustomize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sample_that_differs_is_noted_and_becomes_the_other_one(listener, monkeypatch, tmp_path):
    monkeypatch.setattr(Sample, "__post_init__", Sample.__post_init__)  # put back afterwards
    listener.hook_sample(SimpleNamespace(Sample=Sample))
    forced = Sample.answer(0, 1, [5, 6], [8, 9], [-1.0, -2.0], 3, "stop")
    assert forced.tokens.tolist() == [5, 6, 7] and forced.spans == ((2, 3),) and forced.ended == "length"
    assert forced.logprobs.tolist() == [-0.5] and forced.versions.tolist() == [3]
    for other in (Sample.answer(0, 1, [5, 6], [8, 9], [-1.0, -2.0], 4, "stop"),
                  Sample.answer(0, 1, [5, 5], [8, 9], [-1.0, -2.0], 3, "stop")):  # fmt: skip
        assert other.tokens.tolist()[2:] == [8, 9], "of other weights, or of another prompt"
    (file,) = set(tmp_path.glob("*.jsonl")) - {tmp_path / "answers.jsonl"}
    assert [json.loads(line)["tokens"][2:] for line in file.read_text().splitlines()] == [[8, 9]] * 3


class Sampler:
    """As the house of commit 0ef2e8f has it, with its attributes and a fixed outcome."""

    warpers = staticmethod(lambda input_ids, scores: scores)
    seed_B, prompt_length, greedy_B = torch.tensor([1, 2]), 1, torch.tensor([False, True])

    def __call__(self, input_ids, scores):
        return torch.tensor([[0.0, math.inf, 0.0], [math.inf, 0.0, 0.0]])


def test_the_margin_of_a_draw_is_its_distance_from_the_boundary(listener):
    """Of the probabilities 1/2, 1/4 and 1/4, u = 0.7 takes the second, 0.05 before its end; greedily 1/4 is between."""

    def generate_chunk(self, requests):
        Sampler()(torch.zeros(2, 1), torch.tensor([[0.5, 0.25, 0.25]] * 2).log())
        house.build_batch(requests)

    house = SimpleNamespace(
        KeyedSampler=Sampler, HFGenerator=type("HFGenerator", (), {"_generate_chunk": generate_chunk}),
        build_batch=lambda requests: None, keyed_uniform=lambda seed_B, position: torch.full((2,), 0.7),
    )  # fmt: skip
    listener.hook_hf(house)
    house.HFGenerator()._generate_chunk([1, 2])
    assert listener.margins_of_last == [pytest.approx([0.05]), pytest.approx([0.25])]
    assert listener.CLOSE == CLOSE
