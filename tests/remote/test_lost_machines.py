"""A machine is lost or cut off, as the supervisor sees it: simulated processes, no thread, no sleep."""

from __future__ import annotations

import random
from dataclasses import replace

from rlhf_ray.remote.calls import Process, Worker
from rlhf_ray.remote.supervisor import Supervisor
from tests.remote.test_health import LIMITS, Simulated, Time, run_until, supervised


def test_a_successor_that_finds_no_machine_is_waited_for_and_said_so():
    """Also its machine is lost, and another comes after a minute."""
    time = Time()
    world, supervisor, told = supervised(time, ["reward"], replace(LIMITS, start_s=100))
    world.restart = lambda names: world.later(60, "reward", Process(None, "10.0.0.2", 9), "loads")
    who, world.who = world.who, lambda name: Worker(name, None) if told else who(name)
    world.dead.add(1)
    run_until(supervisor, time, 90)
    assert [kind for kind, *_ in told] == ["worker_lost", "worker_waits", "worker_restarted"]
    assert told[1][2] == (
        "reward waits for a machine with room for it, up to 100 s (ray.start_deadline_s); look at `ray status`"
    )


def cut_off(nodes: dict[str, str], seconds: float) -> list:
    """What is told of workers on these machines: 10.0.0.1 is this one, and 10.0.0.2 is cut off for so long."""
    time, told = Time(), []
    world = Simulated(time, random.Random(1), list(nodes))
    for name, node in nodes.items():
        world.workers[name] = Worker(name, None, node, world.workers[name].pid)
    supervisor = Supervisor(world, world.names, LIMITS, time, lambda *said: told.append(said), "10.0.0.1")
    supervisor.built(world.names)
    world.cut = {name: seconds for name, node in nodes.items() if node == "10.0.0.2"}
    run_until(supervisor, time, 150)
    return told


def test_a_machine_that_is_cut_off_is_waited_for_twice_as_long():
    """35 s are its own limit; after a cut of 30 s TCP may try again only at 51."""
    nodes = {"reward": "10.0.0.2", "reference": "10.0.0.2", "learner rank 0": "10.0.0.1"}
    told = cut_off(nodes, 51)
    assert [kind for kind, *_ in told] == ["worker_silent"] * 2 + ["worker_answers"] * 2
    assert told[0][2].endswith("up to 35 s (ray.silence_s), or 65 s where nobody on its machine gives one")
    assert [kind for kind, *_ in cut_off(nodes, 80)][:4] == ["worker_silent"] * 2 + ["worker_lost"] * 2


def test_one_that_hangs_beside_others_that_answer_is_not():
    time, told = Time(), []
    world = Simulated(time, random.Random(1), ["reward", "reference"])
    supervisor = Supervisor(world, world.names, LIMITS, time, lambda *said: told.append((time.now, *said)), "10.0.0.9")
    supervisor.built(world.names)
    world.hangs.add(1)
    run_until(supervisor, time, 50)
    assert [(kind, name) for _, kind, name, _ in told][:2] == [("worker_silent", "reward"), ("worker_lost", "reward")]
    assert told[1][0] < 37
