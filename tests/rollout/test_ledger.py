"""The books of a run, by hand and under random events."""

from __future__ import annotations

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlhf_ray.rollout.ledger import OUTCOMES, TERMS, Count, Ledger


def counts(ledger: Ledger, **options) -> dict[str, tuple[int, int]]:
    """Those that are not 0, as (samples, tokens)."""
    found = {name: (count.samples, count.tokens) for name, count in ledger.counts(**options).items()}
    return {name: pair for name, pair in found.items() if pair != (0, 0)}


def test_a_step_by_hand():
    """Three groups of two samples, a greedy and a given answer; one is learned from, one filtered, one fails."""
    ledger = Ledger()
    assert ledger.dispatch(3, step=0, sampled=2, greedy=1, given=1) == [0, 1, 2]
    assert counts(ledger) == {"sampled": (9, 0), "open": (9, 0)}
    for position, tokens in enumerate((10, 20, 40)):
        ledger.finish(position, sampled=tokens, greedy=5, given=7)
    assert counts(ledger) == {"sampled": (9, 85), "open": (9, 85)}
    ledger.settle(1, "learned")
    ledger.settle(0, "filtered")
    ledger.settle(2, "failed")
    assert counts(ledger) == {
        "sampled": (9, 85), "learned": (2, 20), "filtered": (2, 10), "failed": (2, 40), "baseline": (3, 15),
        "given": (1, 7),
    }  # fmt: skip
    assert ledger.dispatch(1, step=1, sampled=2) == [3]
    metrics = ledger.metrics()
    assert metrics["ledger/sampled"] == 11 and metrics["ledger/sampled_tokens"] == 85 and metrics["ledger/open"] == 2


def test_what_is_lost_goes_out_again():
    ledger = Ledger(max_staleness=1)
    ledger.dispatch(2, step=2, sampled=4)
    ledger.finish(0, sampled=30)
    ledger.lose(0)
    ledger.lose(1)
    assert counts(ledger) == {"sampled": (8, 30), "lost": (8, 30)}
    assert ledger.dispatch(3, step=2, sampled=4) == [0, 1, 2], "the lost ones first"
    assert counts(ledger) == {"sampled": (20, 30), "lost": (8, 30), "open": (12, 0)}


def test_the_version_is_a_function_of_the_step():
    assert [Ledger().version_for(step) for step in range(4)] == [0, 1, 2, 3]
    assert [Ledger(2).version_for(step) for step in range(5)] == [0, 0, 0, 1, 2]
    assert [Ledger(2, first_version=7).version_for(step) for step in (7, 8, 9, 10)] == [7, 7, 7, 8], "a resumed run"


def test_a_group_is_too_old_beyond_the_bound():
    ledger = Ledger(2)
    (position,) = ledger.dispatch(1, step=3, sampled=1)
    assert ledger.open[position].version == 1
    assert not ledger.too_old(position, 3) and ledger.too_old(position, 4)
    ledger.finish(position, sampled=3)
    ledger.settle(position, "stale")
    assert counts(ledger) == {"sampled": (1, 3), "stale": (1, 3)}


def test_going_back_to_a_version_loses_what_later_ones_have_written():
    ledger = Ledger(1)
    for step in range(4):
        ledger.dispatch(1, step=step, sampled=2)
    assert [entry.version for entry in ledger.open.values()] == [0, 0, 1, 2]
    assert ledger.rewind(1) == [3] and sorted(ledger.open) == [0, 1, 2]
    assert counts(ledger) == {"sampled": (8, 0), "lost": (2, 0), "open": (6, 0)}


def test_a_state_is_a_cut_between_two_versions():
    """What was dispatched since the weights changed depends on the clock, so it is as if it had never been."""
    ledger = Ledger(1)
    for step in range(3):  # steps 0 and 1 at version 0, step 2 at version 1
        ledger.dispatch(2, step=step, sampled=3)
    for position in (0, 1, 2, 3, 4):
        ledger.finish(position, sampled=10)
    ledger.settle(0, "learned")
    ledger.settle(1, "learned")
    cut = {"sampled": (12, 40), "learned": (6, 20), "open": (6, 20)}
    assert counts(ledger, before=1) == cut
    again = Ledger(1)
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict(before=1))))
    assert counts(again) == cut and sorted(again.open) == [2, 3]
    assert again.dispatch(2, step=2, sampled=3) == [4, 5]


def test_an_older_state_has_no_counts():
    ledger = Ledger()
    ledger.load_state_dict({"position": 12})
    assert ledger.dispatch(1, step=3, sampled=2) == [12] and counts(ledger) == {"sampled": (2, 0), "open": (2, 0)}


def test_a_group_is_finished_once_and_decided_on_afterwards():
    ledger = Ledger()
    ledger.dispatch(1, step=0, sampled=1)
    with pytest.raises(ValueError, match="prompt 0 is not finished, so it cannot be learned"):
        ledger.settle(0, "learned")
    ledger.finish(0, sampled=1)
    with pytest.raises(ValueError, match="prompt 0 is finished already"):
        ledger.finish(0, sampled=1)


class AnyOrder(RuleBasedStateMachine):
    """Events in any order, against books that are kept sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(max_staleness=2)
        self.step = 0
        self.decided: set[int] = set()
        self.finished: dict[int, int] = {}  # position -> tokens
        self.saved = (self.ledger.state_dict(), set[int](), dict[int, int]())

    @rule(count=st.integers(1, 3), sampled=st.integers(1, 3), greedy=st.integers(0, 1), given=st.integers(0, 2))
    def dispatch(self, count, sampled, greedy, given):
        again, fresh = self.ledger.again, self.ledger.position
        expected = (again + list(range(fresh, fresh + count)))[:count]
        positions = self.ledger.dispatch(count, step=self.step, sampled=sampled, greedy=greedy, given=given)
        assert positions == expected and not self.decided & set(positions), "none twice"
        assert {self.ledger.open[position].version for position in positions} == {max(0, self.step - 2)}

    def some(self, data, finished: bool) -> int:
        return data.draw(st.sampled_from([p for p, e in self.ledger.open.items() if e.finished == finished]))

    @precondition(lambda self: any(not entry.finished for entry in self.ledger.open.values()))
    @rule(data=st.data(), tokens=st.integers(0, 9))
    def finish(self, data, tokens):
        position = self.some(data, finished=False)
        greedy = 3 * bool(self.ledger.open[position].greedy.samples)
        self.ledger.finish(position, sampled=tokens, greedy=greedy, given=2)
        self.finished[position] = tokens + greedy

    @precondition(lambda self: any(entry.finished for entry in self.ledger.open.values()))
    @rule(data=st.data(), outcome=st.sampled_from(OUTCOMES))
    def settle(self, data, outcome):
        position = self.some(data, finished=True)
        before = self.ledger.counts()
        entry = self.ledger.open[position]
        self.ledger.settle(position, outcome)
        after = self.ledger.counts()
        assert after[outcome] - before[outcome] == entry.sampled
        assert before["open"] - after["open"] == entry.written
        self.decided.add(position)
        del self.finished[position]

    @precondition(lambda self: self.ledger.open)
    @rule(data=st.data())
    def lose(self, data):
        position = data.draw(st.sampled_from(sorted(self.ledger.open)))
        self.ledger.lose(position)
        self.finished.pop(position, None)

    @rule(back=st.integers(0, 2))
    def rewind(self, back):
        for position in self.ledger.rewind(max(0, self.step - 2 - back)):
            self.finished.pop(position, None)

    @rule()
    def next_step(self):
        self.step += 1

    @rule()
    def save(self):
        state = json.loads(json.dumps(self.ledger.state_dict()))
        self.saved = (state, set(self.decided), dict(self.finished))

    @rule()
    def restore(self):
        state, self.decided, self.finished = self.saved[0], set(self.saved[1]), dict(self.saved[2])
        self.ledger = Ledger(max_staleness=2)
        self.ledger.load_state_dict(state)
        assert json.loads(json.dumps(self.ledger.state_dict())) == state

    @invariant()
    def conserved(self):
        counts = self.ledger.counts()
        assert counts["sampled"] == sum((counts[term] for term in TERMS), Count())
        assert counts["open"].tokens == sum(self.finished.values())

    @invariant()
    def a_cut_is_conserved(self):
        for before in range(self.step + 2):
            counts = self.ledger.counts(before)
            assert counts["sampled"] == sum((counts[term] for term in TERMS), Count())

    @invariant()
    def every_position_is_in_one_place(self):
        places = [*self.decided, *self.ledger.open, *self.ledger.again]
        assert sorted(places) == list(range(self.ledger.position)), "none left out, none twice"

    def teardown(self):
        """At the end of a run everything is decided on, and nothing is open."""
        for position, entry in list(self.ledger.open.items()):
            if not entry.finished:
                self.ledger.finish(position, sampled=1)
            self.ledger.settle(position, "learned")
        assert self.ledger.counts()["open"] == Count()


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_what_was_sampled_for_steps_that_the_run_has_left_is_lost():
    books = Ledger()
    books.dispatch(2, step=0, sampled=4)
    for position in (0, 1):
        books.finish(position, sampled=10)
        books.settle(position, "learned")
    saved = books.state_dict()
    books.dispatch(2, step=1, sampled=4)
    books.finish(2, sampled=7)  # 8 samples more, of which 4 have 7 tokens
    again = Ledger()
    again.load_state_dict(saved)
    again.leave(books.sampled)
    counts = again.counts()
    assert (counts["sampled"], counts["learned"], counts["lost"]) == (Count(16, 27), Count(8, 20), Count(8, 7))
    assert again.position == 2, "the same prompts are asked again"
    again.leave(Count())
    assert again.counts() == counts, "a resumed run knows of nothing that was left"
