"""Clusters that are there, that are not, and that are too small. GPUs are only names here: Ray does not look."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.models import library_logs
from rlhf_ray.models.devices import Hardware, choose_hardware
from rlhf_ray.models.threads import WAITING
from rlhf_ray.remote import cluster, placement
from rlhf_ray.remote import roles as remote_roles
from rlhf_ray.remote.calls import Deadline
from rlhf_ray.remote.cluster import connected, worker_environment
from rlhf_ray.remote.crew import Crew
from rlhf_ray.remote.health import Limits
from rlhf_ray.remote.host import Host, Surroundings
from rlhf_ray.remote.placement import Placement, Seat, options_of, placed, plan_seats
from rlhf_ray.remote.roles import _lend_gpus, open_remote_roles
from rlhf_ray.roles.factory import Assets
from rlhf_ray.start.hardware import hardware_of, own_hardware
from rlhf_ray.start.rl import run_rl

VLLM = ("executor=ray", "generator.engine=vllm", "device=auto")
ON_GPU = Assets("nowhere", "nowhere", Hardware("cuda", torch.bfloat16))
SOON = Deadline(60, "ray.start_deadline_s")


# Workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Seeing(Host):
    def visible(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]


def enter(context) -> None:
    with context:
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def no_ray(monkeypatch):
    """Ray itself would wait for minutes: nothing may get so far."""

    def ask(**settings):
        pytest.fail(f"ray.init({settings})")

    monkeypatch.setattr(ray, "init", ask)


def test_nobody_answers_at_the_address(no_ray):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(PlacementError, match=rf"nothing answers at ray.address={address} .*ray start --head"):
        enter(connected(address, cpus=1))


def test_an_address_that_a_finished_cluster_has_left_in_the_environment(no_ray, monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PlacementError, match=rf"nothing answers at \$RAY_ADDRESS={address} "):
        enter(connected(None, cpus=1))


def test_a_ray_that_hangs_is_given_up(monkeypatch):
    """As it does for minutes when the head's GCS is dead and `auto` finds what is left of it."""
    let_go = threading.Event()
    monkeypatch.setattr(ray, "init", lambda **settings: let_go.wait())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    lines = []
    try:
        with pytest.raises(PlacementError, match="did not start .*no answer within 0 s.*/dev/shm.*doctor"):
            enter(connected(None, 1, 0.2, lines.append))
        with pytest.raises(PlacementError, match="no cluster at ray.address=auto .no answer within 0 s.*GCS"):
            enter(connected("auto", 1, 0.2, lines.append))
    finally:
        let_go.set()
    assert lines == ["starting Ray on this machine", "joining the Ray cluster at auto"]


def test_a_run_says_which_cluster_it_asks_before_there_is_a_run(no_ray, tiny_config, capsys):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(PlacementError, match="nothing answers"):
        hardware_of(tiny_config("executor=ray", f"ray.address={address}"))
    assert capsys.readouterr().out == f"asking the Ray cluster at {address} for its GPUs\n"


@pytest.mark.parametrize("failure", [
    Exception("The current node timed out\nduring startup"), OSError("No space left on device"), SystemExit(1),
], ids=["timeout", "disk", "exit"])  # fmt: skip
def test_a_ray_that_does_not_start_ends_in_one_paragraph(monkeypatch, failure):
    def init(**settings):
        raise failure

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(PlacementError) as error:
        enter(connected(None, cpus=1))
    said = str(error.value)
    assert "\n" not in said and f"{type(failure).__name__}: {' '.join(str(failure).split())}" in said
    assert "raylet.out" in said and "GiB are free" in said


@pytest.mark.parametrize(("address", "says"), [
    ("ray://head:10001", "submit it"),
    ("head", "is not host:port"),
])  # fmt: skip
def test_addresses_that_cannot_work(address, says):
    with pytest.raises(ConfigError, match=says):
        enter(connected(address, cpus=1))


def test_environment_of_workers_holds_no_secret(tiny_config, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("OMP_NUM_THREADS")
    config = tiny_config("executor=ray", "ray.cpus_per_worker=3.5")
    for name in (*WAITING, *library_logs.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    assert worker_environment(config.ray.cpus_per_worker, "cuda") == {
        "OMP_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "false", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    assert worker_environment(config.ray.cpus_per_worker, "cpu")["DS_ACCELERATOR"] == "cpu"


def test_workers_wait_for_their_threads_as_the_user_has_said(tiny_config, monkeypatch):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment = worker_environment(0.5, "cpu")
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE" and "GOMP_SPINCOUNT" not in environment


@pytest.mark.engine
def test_a_cluster_of_our_own_ends_with_the_run_and_is_large_enough(monkeypatch):
    heard = threading.Event()

    def terminated(number, frame):
        heard.set()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        lines = []
        with connected(None, cpus=33.5, note=lines.append):
            assert ray.cluster_resources()["CPU"] == 34
            starting, ready = lines
            assert starting == "starting Ray on this machine"
            assert re.fullmatch(r"Ray is ready in \d+ s: 1 machine, 34 CPUs, \d+ GPUs", ready)
            os.kill(os.getpid(), signal.SIGTERM)  # Ray's handler, which Python does not see, would abort this process
            assert heard.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ray.is_initialized()


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["mute", "closes", "http"])
def test_something_else_listens_at_the_address(no_ray, monkeypatch, answer):
    monkeypatch.setattr(cluster, "PROBE_S", 1.0)
    open_sockets = []

    def serve() -> None:
        connection, _ = server.accept()
        open_sockets.append(connection)
        if answer is not None:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PlacementError, match=f"nothing answers at ray.address={address}"):
            enter(connected(address, cpus=1))


@pytest.fixture(scope="module")
def two_gpu_machines():
    """Two machines with 4 CPUs and one (imaginary) GPU each."""
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 1})
    machines.add_node(num_cpus=4, num_gpus=1)
    machines.wait_for_nodes()
    with connected(machines.address, cpus=1):
        yield
    machines.shutdown()


@pytest.mark.engine
def test_the_device_is_what_the_cluster_has_not_the_driver(two_gpu_machines, tiny_config):
    hardware = hardware_of(tiny_config("executor=ray", "device=auto"))
    assert (hardware.device, hardware.dtype) == ("cuda", torch.bfloat16)
    assert own_hardware(hardware) == choose_hardware()
    assert own_hardware(Hardware("cuda", torch.float32)).dtype == torch.float32
    assert hardware_of(tiny_config("executor=ray", "device=cpu")).device == "cpu"
    assert hardware_of(tiny_config("device=auto")) == choose_hardware()


@pytest.mark.engine
def test_on_a_cluster_with_gpus_a_run_takes_vllm(two_gpu_machines, tiny_config, tmp_path):
    config = tiny_config("executor=ray", "device=auto", "learner.engine=deepspeed", "learner.world_size=2")
    with pytest.raises(PlacementError, match=r"needs 3 GPUs \(learner 2, generator 1\), the cluster has 2"):
        run_rl(config, tmp_path / "run")
    assert "generator:\n  engine: vllm" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.engine
def test_too_few_gpus_are_refused_before_anything_starts(two_gpu_machines, tiny_config):
    config = tiny_config(*VLLM, "learner.engine=deepspeed", "learner.world_size=2")
    with pytest.raises(PlacementError, match=r"needs 3 GPUs \(learner 2, generator 1\), the cluster has 2"):
        enter(open_remote_roles(config, ON_GPU))
    with pytest.raises(PlacementError, match="2 GPUs must lie on one machine, the largest has 1"):
        enter(placed(Placement([Seat("generator 0", 0, 1, 2.0)]), 5, colocated=False))


@pytest.mark.engine
def test_too_few_cpus_are_refused(two_gpu_machines, tiny_config):
    config = tiny_config("executor=ray", "ray.cpus_per_worker=5")
    with pytest.raises(PlacementError, match="needs 15 CPUs .* the cluster has 8"):
        enter(open_remote_roles(config, Assets("nowhere", "nowhere", Hardware("cpu", torch.float32))))


@pytest.mark.engine
def test_a_busy_cluster_is_waited_for_until_the_deadline(two_gpu_machines, monkeypatch):
    lines = []
    monkeypatch.setattr(placement, "AT_ONCE_S", 1)
    everything = Placement([Seat("learner rank 0", 0, 1, 1.0), Seat("generator 0", 1, 1, 1.0)])
    with placed(everything, 30, colocated=False):
        started = time.monotonic()
        with pytest.raises(PlacementError, match=r"within 2 s \(ray.start_deadline_s\).* of which 6 and 0 are free"):
            enter(placed(everything, 2, colocated=False, note=lines.append))
        need = "the run needs 2 CPUs and 2 GPUs, of which 6 and 0 are free"
        assert lines == [f"waiting for room in the cluster: {need}"]
        assert time.monotonic() - started < 60, "30 times its limit"


@pytest.mark.engine
def test_roles_on_two_machines_give_the_numbers_of_one_process(two_gpu_machines, tiny_config, tmp_path):
    """Batches go from machine to machine by reference; learner rank 0 and the generators stay together."""
    sizes = ("steps=2", "ray.cpus_per_worker=1.2", "generator.count=2")
    run_rl(tiny_config("steps=2"), tmp_path / "local")
    config = tiny_config("executor=ray", "learner.engine=deepspeed", "learner.world_size=2", *sizes)
    run_rl(config, tmp_path / "ray")
    local, remote = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("local", "ray")
    )
    for a, b in zip(local, remote, strict=True):
        for name in ("loss/policy", "grad_norm", "entropy", "reward/mean"):
            assert b[name] == pytest.approx(a[name], abs=1e-5), name


@pytest.mark.engine
def test_colocated_workers_see_the_gpu_of_the_rank_they_share_with(two_gpu_machines, tiny_config):
    config = tiny_config(
        *VLLM, "ray.colocate=true", "learner.engine=deepspeed", "learner.world_size=2", "generator.count=2"
    )
    plan = plan_seats(config, "cuda", "cuda_ipc")
    team = Crew(Limits.of(config.ray))
    with placed(plan, 30, colocated=True) as group:
        try:
            for seat in plan.seats:
                team.hire(Seeing, seat.name, options_of(seat, group, {}), Surroundings("."))
            places = team.locate(SOON)
            assert [places[f"learner rank {i}"].gpus for i in (0, 1)] == [("0",), ("0",)], "each machine counts its own"
            assert places["generator 1"].gpus == ()
            assert places["generator 0"].node == places["learner rank 0"].node
            _lend_gpus(team, plan, places, SOON)
            seen = team.results([w.start(Seeing.visible, deadline=SOON) for w in team.named("generator")])
            assert seen == ["0", "0"]
        finally:
            team.dismiss()


@pytest.mark.engine
def test_workers_that_cannot_start_are_named(two_gpu_machines, tiny_config, monkeypatch):
    class Broken(remote_roles.RewardHost):
        def __init__(self, name, around):
            raise ImportError("no module named rlhf_ray")

    monkeypatch.setitem(remote_roles.HOSTS, "reward", Broken)
    with pytest.raises(Exception, match="reward did not start: .*no module named rlhf_ray.*needs this version"):
        enter(open_remote_roles(tiny_config("executor=ray"), Assets("x", "x", Hardware("cpu", torch.float32))))
