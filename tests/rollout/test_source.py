import dataclasses
import threading
import time
from typing import Any

import pytest
import torch

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.data.prompt_sources import joined, named
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.protocols import Sampling, Scores
from rlhf_ray.rollout.ledger import TERMS
from rlhf_ray.rollout.measures import rollout_metrics, staleness
from rlhf_ray.rollout.source import Rollouts
from rlhf_ray.run.checkpoint import Checkpoints
from rlhf_ray.run.timer import Timer
from rlhf_ray.sample import sample_seed

SAMPLING = Sampling(4)


@pytest.fixture
def rollouts(generator, reward, prompts):
    def make(position: int = 0) -> Rollouts:
        config = RolloutConfig(prompts_per_step=3, group_size=2)
        made = Rollouts(
            generator, reward, prompts, config, SAMPLING,
            algorithm=AlgorithmConfig(), seed=7, timer=Timer(), texts=3, steps=20,
        )  # fmt: skip
        made.load_state_dict({"position": position})
        return made

    return make


# ---- requests -------------------------------------------------------------------------------------------------


def test_a_step_asks_for_its_place_in_the_stream(rollouts, generator):
    here = rollouts(6)
    scored = here.next(2)
    asked = generator.asked[0]
    assert [r.prompt_id for r in asked] == [6, 6, 7, 7, 8, 8], "prompts 6, 7, 8 of the stream"
    assert [r.sample_id for r in asked] == [12, 13, 14, 15, 16, 17]
    assert generator.sampling == [SAMPLING]
    assert scored.batch.score.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(scored.scores.texts) == 3
    assert scored.batch.temperature is None and scored.batch.baseline is None
    assert here.state_dict()["position"] == 9


def test_prompts_of_a_step_are_a_function_of_the_position(rollouts, generator):
    whole = rollouts()
    for step in (0, 1, 2):
        whole.next(step)
    rollouts(3).next(1)
    assert generator.asked[3] == generator.asked[1], "a new object, the same requests"
    assert generator.asked[0] != generator.asked[1]


def test_a_step_that_fails_has_not_moved_on(rollouts, generator):
    generator.fail_at = 0
    here = rollouts(3)
    with pytest.raises(RuntimeError, match="fell over"):
        here.next(1)
    assert here.state_dict()["position"] == 3


def test_every_epoch_visits_every_prompt_once(rollouts):
    requests = rollouts().asking.requests(range(10))
    for epoch in (requests[:10], requests[10:]):
        assert sorted(r.columns["prompt"] for r in epoch) == sorted(f"p{i}" for i in range(5) for _ in range(2))


def test_requests_carry_their_prompt(rollouts):
    for request in rollouts().asking.requests(range(5)):
        index = int(request.columns["answer"])
        assert request.token_ids == (10 + index,) * (index + 1) and request.columns["prompt"] == f"p{index}"


def test_seeds_are_keyed_by_run_position_and_member(rollouts):
    seeds = {(r.prompt_id, r.sample_id % 2): r.seed for r in rollouts().asking.requests(range(50))}
    assert seeds[(3, 1)] == sample_seed(7, 3, 1) and len(set(seeds.values())) == 100
    assert sample_seed(8, 3, 1) != sample_seed(7, 3, 1)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert sample_seed(0, 0, 0) == 759540517790923586, "pinned: other seeds would be another run after an upgrade"


def test_members_of_a_group_lie_side_by_side_with_their_own_seeds(rollouts):
    requests = rollouts().asking.requests([4])
    assert [r.prompt_id for r in requests] == [4, 4] and requests[0].seed != requests[1].seed
    assert requests[0].token_ids == requests[1].token_ids


# ---- metrics --------------------------------------------------------------------------------------------------


def test_metrics_by_hand(rollouts, generator):
    generator.version = 1
    metrics = rollouts().next(2).metrics
    expected = {
        "reward/mean": 2.5, "reward/std": (35 / 12) ** 0.5, "reward/min": 0.0, "reward/max": 5.0,
        "reward/row": 2.5, "reward/half": 1.25, "response_len/mean": 1.0, "response_len/max": 1.0,
        "truncated_frac": 0.0, "staleness/mean": 1.0, "staleness/max": 1.0,
        # groups (0, 1), (2, 3), (4, 5)
        "groups/all_correct": 2 / 3, "groups/all_wrong": 0.0, "groups/mixed": 1 / 3, "groups/same": 0.0,
        "reward/std_in_group": 0.5, "fault/not_finite": 0.0,
    }  # fmt: skip
    assert metrics == pytest.approx(expected)


def test_groups(rollouts):
    scored = rollouts().next(0)
    score_B = torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0, 1.0])
    metrics = rollout_metrics(scored.batch.rows, Scores(score_B, {}, ()), 0)
    assert [metrics[f"groups/{name}"] for name in ("all_correct", "all_wrong", "mixed")] == pytest.approx([1 / 3] * 3)
    assert metrics["groups/same"] == pytest.approx(1 / 3)
    assert metrics["reward/std_in_group"] == pytest.approx((0 + 0.5 + 0.5) / 3)


def test_staleness_counts_from_the_oldest_token(rollouts):
    batch = rollouts().next(0).batch
    version = batch.weight_version.clone()
    version[batch.response_mask] = torch.tensor([5, 4, 5, 5, 3, 5], dtype=torch.int32)
    rows = batch.replace(weight_version=version).rows
    assert staleness(rows, 5) == {"staleness/mean": 0.5, "staleness/max": 2.0}


# ---- running ahead --------------------------------------------------------------------------------------------


@pytest.fixture
def overlapped(generator, reward, prompts):
    made = []

    def make(bound: int, steps: int = 20) -> Rollouts:
        config = RolloutConfig(prompts_per_step=3, group_size=2, max_staleness=bound)
        ahead = Rollouts(
            generator, reward, prompts, config, SAMPLING,
            algorithm=AlgorithmConfig(), seed=7, timer=Timer(), texts=3, steps=steps,
        )  # fmt: skip
        made.append(ahead)
        return ahead

    yield make
    for ahead in made:
        ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def settle(condition) -> None:
    while not condition():  # the test's time limit ends it
        time.sleep(0.002)
    time.sleep(0.02)  # would it go on too far?


def push(ahead: Rollouts, generator, version: int) -> dict[str, float]:
    ahead.finish_writing()
    assert not generator.generating
    generator.version = version
    return ahead.weights_changed(version)


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_it_runs_ahead_to_the_bound_and_no_further(overlapped, generator, bound):
    ahead = overlapped(bound)
    push(ahead, generator, 0)
    for step in range(8):
        settle(lambda step=step: len(generator.asked) >= step + bound + 1)
        assert len(generator.asked) == step + bound + 1, "steps up to version + bound, whatever the time"
        scored = ahead.next(step)
        assert [r.prompt_id for r in generator.asked[step]] == scored.batch.prompt_id.tolist()
        assert scored.metrics["staleness/max"] == min(step, bound)
        assert scored.metrics["staleness/max"] <= bound
        push(ahead, generator, step + 1)


def test_the_same_prompts_as_without_overlap(overlapped, rollouts, generator):
    ahead = overlapped(2, steps=4)
    push(ahead, generator, 0)
    for step in range(4):
        ahead.next(step)
        push(ahead, generator, step + 1)
    settle(lambda: len(generator.asked) == 4)
    assert ahead.state_dict()["position"] == 12, "of what the loop has taken, not of what lies ready"
    here = rollouts()
    for step in range(4):
        here.next(step)
    assert generator.asked[:4] == generator.asked[4:]


def test_nothing_is_generated_before_the_first_sync(overlapped, generator):
    """A resumed run's generator holds the weights of its folder until then."""
    ahead = overlapped(1)
    ahead.load_state_dict({"position": 15})
    time.sleep(0.1)
    assert generator.asked == []
    push(ahead, generator, 5)
    scored = ahead.next(5)
    assert scored.batch.rows.weight_version.tolist() == [5] * 6 and scored.metrics["staleness/max"] == 0
    assert scored.batch.prompt_id.tolist()[0] == 15


def test_new_weights_wait_for_the_sequences_but_not_for_their_rewards(overlapped, generator, reward):
    ahead = overlapped(1)
    push(ahead, generator, 0)
    ahead.finish_writing()  # steps 0 and 1
    generator.gate = threading.Event()
    push(ahead, generator, 1)
    settle(lambda: generator.generating)
    ahead.timer.take()
    pushed = threading.Thread(target=push, args=(ahead, generator, 2))
    pushed.start()
    pushed.join(0.05)
    assert pushed.is_alive(), "it waits"
    reward.gate = threading.Event()  # now the reward hangs
    generator.gate.set()
    pushed.join(20)
    assert not pushed.is_alive()
    assert ahead.timer.take()["time/wait"] > 0.04, "and it is measured"
    reward.gate.set()
    assert [ahead.next(step).batch.rows.weight_version[0] for step in range(3)] == [0, 0, 1]


def test_new_weights_wait_for_what_is_due_to_the_old_ones(overlapped, generator):
    """By the clock alone, a slow generator would write step 2 with newer weights in one run and not in the next."""
    ahead = overlapped(1)
    push(ahead, generator, 0)
    ahead.finish_writing()
    write = generator.generate

    def slowly(*args):
        time.sleep(0.03)
        return write(*args)

    generator.generate = slowly
    for version in range(1, 5):
        push(ahead, generator, version)  # the learner is much faster
    versions = [set(ahead.next(step).batch.rows.weight_version) for step in range(6)]
    assert versions == [{0}, {0}, {1}, {2}, {3}, {4}], "step k by version k - 1 exactly"


def test_an_error_of_the_thread_reaches_the_loop(overlapped, generator):
    generator.fail_at = 1
    ahead = overlapped(3)
    push(ahead, generator, 0)
    ahead.next(0)
    with pytest.raises(RuntimeError, match="the generator fell over"):
        ahead.next(1)


def test_closing_while_it_waits_for_weights(overlapped, generator):
    ahead = overlapped(1)
    push(ahead, generator, 0)
    settle(lambda: len(generator.asked) == 2)  # then the fixture closes it


def test_closing_before_the_first_sync(overlapped):
    overlapped(1)


def test_the_wait_is_measured(overlapped, generator):
    ahead = overlapped(1)
    generator.gate = threading.Event()
    push(ahead, generator, 0)
    threading.Timer(0.1, generator.gate.set).start()
    ahead.next(0)
    assert ahead.timer.take()["time/wait"] > 0.05


# ---- going on ---------------------------------------------------------------------------------------------------


def saved(ahead: Rollouts, folder) -> dict[str, Any]:
    """Its state, by way of a checkpoint."""
    return Checkpoints(folder).load(Checkpoints(folder).save(1, lambda path: None, ahead.state_dict()))[2]


def test_what_is_ready_is_learned_from_after_a_stop(overlapped, generator, prompts, tmp_path):
    whole = overlapped(2, steps=7)
    batches, states, books = [], [], []
    for step in range(7):
        books.append(push(whole, generator, step))
        states.append(saved(whole, tmp_path / str(step)))
        batches.append(whole.next(step))
    asked = [[request.prompt_id for request in requests] for requests in generator.asked]
    for stopped in (1, 3, 6):
        del generator.asked[:]
        generator.version = -5  # that of the folder
        again = overlapped(2, steps=7)
        again.load_state_dict(states[stopped])
        for step in range(stopped, 7):
            assert push(again, generator, step) == books[step]
            found, expected = again.next(step), batches[step]
            assert found.metrics == expected.metrics and found.outcomes == expected.outcomes
            for field in dataclasses.fields(Batch):
                one, other = getattr(found.batch, field.name), getattr(expected.batch, field.name)
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
            assert found.scores.texts == expected.scores.texts
        assert [[r.prompt_id for r in requests] for requests in generator.asked] == asked[stopped + 2 :], "no more"


def test_what_runs_ahead_goes_back_with_the_run(overlapped, generator, tmp_path):
    """Step 2 is learned from twice. Of the first time nothing comes later, and its answers are counted as lost."""
    ahead = overlapped(2, steps=7)
    for step in (0, 1):
        push(ahead, generator, step)
        ahead.next(step)
    push(ahead, generator, 2)
    state = saved(ahead, tmp_path)
    first = ahead.next(2)
    push(ahead, generator, 3)
    sampled = ahead.ledger.sampled
    ahead.go_back()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]
    ahead.load_state_dict(state)
    push(ahead, generator, 2)
    again = ahead.next(2)
    assert again.outcomes == first.outcomes and torch.equal(again.batch.tokens, first.batch.tokens)
    for step in range(3, 7):
        books = push(ahead, generator, step)
        ahead.next(step)
    assert books["ledger/learned"] == 6 * 6 and books["ledger/open"] == 6
    assert books["ledger/lost"] == sampled.samples - state["sampled"][0] > 0
    assert books["ledger/sampled"] == sum(books[f"ledger/{term}"] for term in TERMS)


def test_with_a_smaller_bound_the_older_ones_are_dropped(overlapped, rollouts, generator, tmp_path):
    """At version 4, steps 4 and 5 are ready, written by versions 2 and 3. A bound of 1 wants 3 and 4."""
    ahead = overlapped(2)
    for step in range(4):
        push(ahead, generator, step)
        ahead.next(step)
    push(ahead, generator, 4)
    state = saved(ahead, tmp_path)
    ahead.close()
    for bound in (1, 0):
        less = overlapped(bound) if bound else rollouts()
        less.load_state_dict(state)
        push(less, generator, 4)
        scored = less.next(4)
        assert scored.batch.prompt_id.tolist() == [18, 18, 19, 19, 20, 20], "behind those of steps 4 and 5"
        assert scored.metrics["dropped_stale"] == 12 and scored.metrics["staleness/max"] == 0
        push(less, generator, 5)
        assert "dropped_stale" not in less.next(5).metrics
        metrics = push(less, generator, 6)
        assert metrics["ledger/stale"] == 12 and metrics["ledger/learned"] == 36
        less.close()


def test_books_without_what_is_ready_ask_it_again(overlapped, generator):
    ahead = overlapped(1)
    for step in range(3):
        push(ahead, generator, step)
        ahead.next(step)
    push(ahead, generator, 3)
    state = {**ahead.state_dict(), "ready": {}}
    ahead.close()
    again = overlapped(1)
    again.load_state_dict(state)
    metrics = push(again, generator, 3)
    assert metrics["ledger/lost"] == 6 and metrics["ledger/sampled"] == 24 and metrics["ledger/open"] == 0
    assert again.next(3).batch.prompt_id.tolist() == [9, 9, 10, 10, 11, 11]


# ---- several sources ------------------------------------------------------------------------------------------


def test_metrics_of_each_source_are_those_of_its_own_answers(generator, reward, prompts):
    """Scores are 0, 1, 2, ... by row: three prompts of math and one of chat a step, two answers each."""
    mixed = joined([named(prompts.slice(0, 3), "math", 3.0), named(prompts.slice(3, 5), "chat", 1.0)])
    made = Rollouts(
        generator, reward, mixed, RolloutConfig(prompts_per_step=4, group_size=2), SAMPLING,
        algorithm=AlgorithmConfig(), seed=7, timer=Timer(), texts=3, steps=20,
    )  # fmt: skip
    for step in (0, 1):
        scored = made.next(step)
        metrics = scored.metrics
        assert scored.sources == ("math",) * 6 + ("chat",) * 2
        asked = [request.columns["data_source"] for request in generator.asked[step]]
        assert asked == ["math"] * 6 + ["chat"] * 2
        assert metrics["source/math/reward/mean"] == 2.5 and metrics["source/chat/reward/mean"] == 6.5
        assert metrics["source/math/reward/half"] == 1.25 and metrics["source/chat/groups/all_correct"] == 1.0
        assert metrics["source/math/groups/all_correct"] == pytest.approx(2 / 3), "the first group earns 0 and 1"
        assert (metrics["source/math/count"], metrics["source/chat/count"]) == (6, 2)
        assert (metrics["source/math/epochs"], metrics["source/chat/epochs"]) == (step + 1, (step + 1) / 2)
        assert metrics["reward/mean"] == 3.5 and not any("stale" in n for n in metrics if n.startswith("source/"))


def test_one_source_has_no_metrics_of_its_own(rollouts):
    scored = rollouts().next(0)
    assert not any(name.startswith("source/") for name in scored.metrics) and scored.sources == ()
