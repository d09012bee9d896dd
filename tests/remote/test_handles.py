"""Generators as services behind one handle; the workers are threads of this process."""

from __future__ import annotations

import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_ray.errors import ConfigError, DataError, DeadlineError, RequestError, RewardError
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.remote.batch import RemoteBatch
from rlhf_ray.remote.calls import Deadline
from rlhf_ray.remote.client import GeneratorsClient
from rlhf_ray.remote.crew import GoneError
from rlhf_ray.remote.handles import RemoteGenerators
from rlhf_ray.remote.health import State
from rlhf_ray.remote.hosts import GeneratorHost
from rlhf_ray.remote.packed import Packed, unpack
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.sample import Sample
from tests.remote.in_process import InProcess

SOON = Deadline(60, "ray.call_deadline_s")
SAMPLING = Sampling(3)


class Engine:
    """Ends one request at a time, the last one first; its answer is its sample_id. Fails at that of `fails_at`."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.fails_at: int | None = None
        self.gate: threading.Event | None = None
        self.submitted: list[list[int]] = []  # sample_ids

    @property
    def open(self) -> int:
        return len(self.waiting)

    def submit(self, requests, sampling) -> None:
        self.submitted += [[request.sample_id for request in requests]] if requests else []
        self.waiting += requests

    def collect(self) -> list[Sample]:
        if self.gate is not None:
            self.gate.wait(20)
        one = self.waiting.pop()
        if one.sample_id == self.fails_at:
            raise RequestError(f"sample {one.sample_id} failed", (one.sample_id,))
        return [Sample.answer(one.prompt_id, one.sample_id, one.token_ids, [one.sample_id], [-0.5], 3, "stop")]

    def cancel(self, sample_ids) -> None:
        self.waiting = [request for request in self.waiting if request.sample_id not in sample_ids]


@pytest.fixture
def world():
    made = InProcess()
    yield made
    made.close()


def opened(world: InProcess, engines: list[Engine], rows: int = 64) -> RemoteGenerators:
    workers = [world.hire(f"generator {i}", engine) for i, engine in enumerate(engines)]
    return RemoteGenerators(world, workers, rows, workers_each=1, sync_deadline=SOON, deadline=SOON)


def requests_of(groups: int, members: int = 2) -> list[Request]:
    return [Request(g, members * g + m, (7,), seed=0) for g in range(groups) for m in range(members)]


def answers(world: InProcess, batch: RemoteBatch) -> list[int]:
    """The one token of each row."""
    found = torch.zeros(len(batch), dtype=torch.long)
    for part in batch.parts:
        rows = unpack(world.taken("a test", part.ref).select(part.places), {}, {})
        found[part.rows] = rows.tokens[:, 1]
    return found.tolist()


def test_a_small_step_keeps_every_generator_busy(world):
    engines = [Engine(), Engine()]
    batch = opened(world, engines, rows=1024).generate(requests_of(3), SAMPLING)
    assert [engine.submitted for engine in engines] == [[[0, 1, 4, 5]], [[2, 3]]], "groups stay whole"
    assert answers(world, batch) == [0, 1, 2, 3, 4, 5] and batch.rows.prompt_id.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_call_knows_the_prompts_that_its_generator_has_open(world, monkeypatch):
    """What is told of a call that does not end."""
    seen, next_done = [], world.next_done

    def looked(calls):
        seen.append({call.worker.name: sorted(call.prompts()) for call in calls})
        return next_done(calls)

    monkeypatch.setattr(world, "next_done", looked)
    opened(world, [Engine(), Engine()], rows=1024).generate(requests_of(3), SAMPLING)
    assert seen[0] == {"generator 0": [0, 2], "generator 1": [1]}
    assert all(prompts in ([0, 2], [0], [2], [1], []) for look in seen for prompts in look.values()) and len(seen) > 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_models_write_the_same_tokens_whoever_is_given_what(count):
    """Groups of odd sizes; each generator writes five rows side by side, and they answer in an order that changes."""
    shape = {"vocab_size": 11, "hidden_size": 16, "layers": 1, "heads": 2, "max_length": 64}

    def model() -> HFGenerator:
        return HFGenerator(build_scratch("qwen2", seed=1, **shape), pad_token_id=0, batch_size=5)

    requests, sampling = [], Sampling(12, stop_token_ids=(1, 2))
    for group, size in enumerate((3, 1, 7, 2, 5, 1, 4)):
        prompt = (3,) * (1 + group % 3)
        requests += [Request(group, 10 * group + member, prompt, seed=10 * group + member) for member in range(size)]
    expected = model().generate(requests, sampling)
    assert len(set(expected.rows.response_lengths)) > 4, "skewed"
    turns = itertools.count()
    world = InProcess(lambda calls: next(turns) % calls)
    batch = opened(world, [model() for _ in range(count)], rows=5).generate(requests, sampling)
    found = Packed.cat([world.taken("a test", part.ref) for part in batch.parts])
    order = np.argsort(np.concatenate([part.rows for part in batch.parts]))
    assert torch.equal(unpack(found.select(order), {}, {}).tokens, expected.tokens)
    assert batch.rows == expected.rows and len({part.worker.name for part in batch.parts}) == count
    world.close()


def test_the_only_generator_gets_everything_at_once(world):
    """What it writes side by side, and so each sum inside, is then no matter of time."""
    engine = Engine()
    opened(world, [engine], rows=2).generate(requests_of(20), SAMPLING)
    assert engine.submitted == [list(range(40))]


def test_beyond_its_room_a_generator_is_given_what_ends_elsewhere(world):
    slow, fast = Engine(), Engine()
    slow.gate = threading.Event()
    world.choose = lambda calls: calls - 1
    generators = opened(world, [slow, fast], rows=4)
    # Room for four rows and, twice, the two that may end before it hears of more: four groups.
    found: list[RemoteBatch] = []
    call = threading.Thread(target=lambda: found.append(generators.generate(requests_of(20), SAMPLING)))
    call.start()
    while sum(map(len, fast.submitted)) < 32:  # the test's time limit ends it
        time.sleep(0.001)
    assert sum(map(len, slow.submitted)) == 8
    slow.gate.set()
    call.join(20)
    assert answers(world, found[0]) == list(range(40))


def test_after_a_failure_nothing_of_it_is_left(world):
    engines = [Engine(), Engine()]
    engines[1].fails_at = 3
    generators = opened(world, engines)
    with pytest.raises(RequestError, match="sample 3 failed"):
        generators.generate(requests_of(6), SAMPLING)
    engines[1].fails_at = None
    assert answers(world, generators.generate(requests_of(4), SAMPLING)) == list(range(8))


@pytest.mark.parametrize("last", [0, 1])
def test_parcels_are_told_as_soon_as_they_are_written(world, last):
    """A group each: the one generator waits until what the other has written has been told."""
    engines = [Engine(), Engine()]
    world.choose = lambda calls: 0 if last else calls - 1
    engines[last].gate = threading.Event()
    told: list[int] = []

    def written(parcel: int, batch: RemoteBatch) -> None:
        told.append(parcel)
        assert answers(world, batch) == [2 * parcel, 2 * parcel + 1]
        assert batch.rows.prompt_id.tolist() == [parcel] * 2 and set(batch.prompts) == {parcel}
        engines[last].gate.set()

    batch = opened(world, engines).generate_parcels(requests_of(2), SAMPLING, [range(2), range(2, 4)], written)
    assert told == [1 - last, last] and answers(world, batch) == [0, 1, 2, 3]


def test_what_hears_of_parcels_may_end_the_call(world):
    engines = [Engine(), Engine()]
    generators = opened(world, engines)

    def written(parcel: int, batch: RemoteBatch) -> None:
        raise RewardError("no number")

    with pytest.raises(RewardError, match="no number"):
        generators.generate_parcels(requests_of(9), SAMPLING, [range(2), range(2, 18)], written)
    assert answers(world, generators.generate(requests_of(4), SAMPLING)) == list(range(8))


def test_given_answers_come_with_their_group(world):
    requests = [Request(0, 0, (7,), 0), Request(0, 1, (7,), 0, answer=(5,)), Request(1, 2, (7,), 0, answer=(6,))]
    batch = opened(world, [Engine(), Engine()]).generate(requests, SAMPLING)
    assert answers(world, batch) == [0, 5, 6] and batch.rows.weight_version.tolist() == [3, -1, -1]


def test_two_callers_do_not_get_each_others_answers(world):
    """An evaluation, while a thread writes ahead."""
    engine, found = Engine(), {}
    generators = opened(world, [engine])
    held_out = [Request(9, 100 + i, (7,), seed=0) for i in range(4)]

    def ask(name, requests):
        found[name] = generators.generate(requests, SAMPLING)

    threads = [threading.Thread(target=ask, args=args) for args in (("one", requests_of(9)), ("other", held_out))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers(world, found["one"]) == list(range(18))
    assert answers(world, found["other"]) == [100, 101, 102, 103]


class Versioned(Engine):
    version = 0
    says: list[list[float]] = []

    def logprobs(self, tokens) -> list[list[float]]:
        return self.says


class Pusher:
    """A learner that holds a version, and a sender that sends no more than that."""

    def __init__(self, generators: RemoteGenerators) -> None:
        self.version, self.sender, self.turn = 0, self, threading.Lock()
        self.generators = GeneratorsClient(generators.generators, workers_each=1, deadline=SOON)
        self.sent: list[tuple[int, list[str]]] = []

    def push_weights(self, version: int) -> None:
        self.version = version
        self.send_again(self.generators)

    def send_again(self, client: GeneratorsClient) -> bool:
        self.sent.append((self.version, [worker.name for worker in client.generators]))
        for worker in client.generators:
            worker.actor.host.role.version = self.version
        return self.version > 0


def test_the_sleep_of_one_that_is_not_there_is_nobodys_business(with_successor):
    """All are lost, and nothing has been sent that could be sent again: the first sync must not wait for them."""
    found, generators = with_successor, with_successor.generators
    found.stale += ["generator 0", "generator 1"]
    generators.wake()
    generators.sleep()
    assert not generators.successors.sync(generators.generators[0]), "before the first sync there is nothing to have"
    found.learner.version = 1
    assert [one.worker.name for one in generators.replicas] == ["generator 0"]


@pytest.fixture
def with_successor(world, monkeypatch):
    """Two generators and the learner that sends them their weights; names in `stale` are of those that have none."""
    found = SimpleNamespace(stale=[], engines=[Versioned(), Versioned()], lost=[])
    monkeypatch.setattr(world, "state", lambda worker: State.STALE if worker.name in found.stale else State.HEALTHY)
    monkeypatch.setattr(world, "synced", lambda worker: found.stale.remove(worker.name), raising=False)
    monkeypatch.setattr(world, "check", lambda calls=(): None, raising=False)
    found.generators = opened(world, found.engines)
    found.learner = Pusher(found.generators)
    found.generators.successors.learner = world.hire("learner rank 0", found.learner)
    world.choose = lambda calls: calls - 1  # the sending of weights, where there is one
    return found


def test_a_successor_gets_the_weights_that_were_pushed_last(with_successor):
    """Lost between a step's weight sync and its first request."""
    found, generators = with_successor, with_successor.generators
    found.learner.push_weights(1)
    generators.generate(requests_of(2), SAMPLING)
    found.learner.push_weights(2)
    found.engines[1].version = 0
    found.stale.append("generator 1")
    generators.generate(requests_of(2), SAMPLING)
    assert [engine.version for engine in found.engines] == [2, 2] and generators.version == 2
    both = ["generator 0", "generator 1"]
    assert found.learner.sent == [(1, both), (2, both), (2, ["generator 1"])]
    assert [worker.name for worker in found.learner.generators.generators] == both, "the next push goes to all again"


def test_the_others_write_on_while_one_is_sent_the_weights(with_successor, world):
    found, generators = with_successor, with_successor.generators
    found.stale.append("generator 1")
    world.choose = lambda calls: 0
    with found.learner.turn:  # the learner pushes to others
        assert answers_count(generators, 3) == 6
    assert found.engines[1].submitted == [] and found.engines[0].submitted == [[0, 1, 2, 3, 4, 5]]


def answers_count(generators, groups) -> int:
    return len(generators.generate(requests_of(groups), SAMPLING))


def test_a_successor_that_answers_otherwise_gets_no_work(with_successor, world, monkeypatch):
    """The canary has asked the other one; the same tokens are nats apart here."""
    found, generators = with_successor, with_successor.generators
    found.learner.push_weights(3)
    found.engines[0].says, found.engines[1].says = [[0.0, -1.5]], [[0.0, -1.25]]
    assert generators.replicas[0].logprobs([[1, 2]]) == [[0.0, -1.5]]
    found.stale.append("generator 1")

    def report(call, error):
        found.lost.append(str(error))
        found.stale.clear()
        monkeypatch.setattr(world, "state", lambda w: State.DEAD if w.name == "generator 1" else State.HEALTHY)

    monkeypatch.setattr(world, "supervisor", SimpleNamespace(report=report), raising=False)
    assert answers_count(generators, 3) == 6 and found.engines[1].submitted == []
    [reason] = found.lost
    assert "generator 1" in reason and "holds version 3" in reason and "differ by 0.25 nats" in reason
    assert [replica.worker.name for replica in generators.replicas] == ["generator 0"]


def test_a_successor_is_not_to_blame_for_broken_weights(with_successor):
    """All generators answer NaN: the run has diverged, and says so at its next step."""
    found, generators = with_successor, with_successor.generators
    found.learner.push_weights(3)
    for engine in found.engines:
        engine.says = [[0.0, float("nan")]]
    generators.replicas[0].logprobs([[1, 2]])
    found.stale.append("generator 1")
    assert generators.successors.sync(generators.generators[1]) and not found.stale


@pytest.mark.parametrize(("version", "says"), [(4, [[0.0, -1.25]]), (3, [[0.0, -1.5004]])], ids=["newer", "rounding"])
def test_a_successor_with_newer_weights_or_other_rounding_is_taken(with_successor, version, says):
    found, generators = with_successor, with_successor.generators
    found.learner.push_weights(3)
    found.engines[0].says, found.engines[1].says = [[0.0, -1.5]], says
    generators.replicas[0].logprobs([[1, 2]])
    found.learner.version = version
    found.stale.append("generator 1")
    assert generators.successors.sync(generators.generators[1]) and not found.stale


@pytest.fixture
def hung(world, monkeypatch):
    """`names` of generators whose calls are late, whoever sits there; the `late` calls."""
    told = SimpleNamespace(names=set(), late=[])
    next_done = world.next_done

    def or_late(calls):
        for call in calls:
            if call.worker.name in told.names:
                call.late = True
                told.late.append(call.name)
                raise GoneError(f"{call} is late", call) from DeadlineError(f"{call} is late")
        return next_done(calls)

    monkeypatch.setattr(world, "next_done", or_late)
    monkeypatch.setattr(world, "results", lambda calls: [or_late([call]) for call in calls])
    monkeypatch.setattr(world, "supervisor", SimpleNamespace(ready=lambda call: True), raising=False)
    return told


def test_groups_that_were_late_are_written_once_more_and_no_more_than_that(world, hung):
    generators = opened(world, [Engine(), Engine()])
    hung.names.add("generator 1")
    with pytest.raises(DeadlineError, match="write of generator 1 .* is late"):
        generators.generate(requests_of(4), SAMPLING)
    assert hung.late == ["write", "write"]
    hung.names.clear()
    assert answers(world, generators.generate(requests_of(4), SAMPLING)) == list(range(8))


def test_a_small_call_that_was_late_is_sent_once_more_and_no_more_than_that(world, hung):
    generators = opened(world, [Versioned(), Versioned()])
    hung.names.add("generator 1")
    with pytest.raises(DeadlineError, match="version of generator 1 .* is late"):
        _ = generators.version
    assert len(hung.late) == 2


def test_requests_that_cannot_be_told_apart_are_refused(world):
    with pytest.raises(DataError, match="two requests have the same sample_id"):
        opened(world, [Engine()]).generate([Request(0, 5, (7,), 0), Request(1, 5, (7,), 1)], SAMPLING)


def test_a_generator_that_takes_no_requests_is_refused_before_the_first_step():
    class Whole:
        def generate(self, requests, sampling): ...

    with pytest.raises(ConfigError, match="the generator Whole has no submit, collect or cancel.*executor=local"):
        GeneratorHost.serve(GeneratorHost.__new__(GeneratorHost), Whole())
