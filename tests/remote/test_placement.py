"""Seats and bundles, counted by hand. No Ray is started and no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from rlhf_ray.config.load import load_config, on_device
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import PlacementError
from rlhf_ray.remote import placement as placement_module
from rlhf_ray.remote.calls import Worker
from rlhf_ray.remote.placement import Placement, Seat, check_fit, choose_transport, placed, plan_seats
from rlhf_ray.remote.roles import _devices

PPO = ("algorithm.name=ppo", "algorithm.kl_coef=0.05")
SHARDED = ("executor=ray", "learner.engine=deepspeed")
VLLM = ("generator.engine=vllm",)


def seats_of(plan: Placement) -> dict[str, tuple[int, float]]:
    return {seat.name: (seat.bundle, seat.gpus) for seat in plan.seats}


def test_smallest_run_on_cpu(tiny_config):
    plan = plan_seats(tiny_config("executor=ray"), "cpu", "shared_memory")
    assert seats_of(plan) == {"learner rank 0": (0, 0), "generator 0": (0, 0), "reward": (1, 0)}
    assert plan.bundles == [{"CPU": 1.0}, {"CPU": 0.5}]


def test_shared_memory_puts_the_sender_and_all_generators_on_one_machine(tiny_config):
    config = tiny_config(*SHARDED, "learner.world_size=3", "generator.count=2")
    plan = plan_seats(config, "cpu", "shared_memory")
    assert [s.name for s in plan.seats if s.bundle == 0] == ["learner rank 0", "generator 0", "generator 1"]
    assert len({s.bundle for s in plan.seats}) == 1 + 2 + 1


def test_gpus_of_a_whole_ppo_run(tiny_config):
    config = tiny_config(
        *SHARDED, *VLLM, *PPO, "device=cuda", "learner.world_size=4", "critic.engine=deepspeed",
        "critic.world_size=2", "generator.count=2", "generator.tensor_parallel=2", "reward_model.path=judge",
    )  # fmt: skip
    plan = plan_seats(config, "cuda", "nccl")
    assert plan.total("GPU") == 4 + 2 + 2 * 2 + 1 + 1
    assert plan.by_role("GPU") == {"learner": 4, "generator": 4, "critic": 2, "reference": 1, "reward": 1}
    assert seats_of(plan)["generator 1"][1] == 2, "the GPUs of a tensor-parallel generator are one actor's"
    assert all(len([s for s in plan.seats if s.bundle == i]) == 1 for i in range(len(plan.bundles)))


@pytest.mark.parametrize(("overrides", "gpus"), [
    ([], 8), (["ray.colocate=true"], 4), (["learner.world_size=1", "generator.count=1"], 2),
])  # fmt: skip
def test_the_config_for_eight_gpus(repo_root, overrides, gpus):
    """And what its first lines say of fewer."""
    config = load_config(repo_root / "configs" / "grpo_gsm8k_8gpu.yaml", overrides, RunConfig)
    config = on_device(config, "cuda")
    plan = plan_seats(config, "cuda", choose_transport(config.sync, config.generator, config.ray, "cuda"))
    assert plan.total("GPU") == gpus
    assert max(bundle.get("GPU", 0) for bundle in plan.bundles) == 1


def test_reward_functions_need_no_gpu_and_no_reference_no_seat(tiny_config):
    plan = plan_seats(tiny_config("executor=ray", "device=cuda", *VLLM), "cuda", "nccl")
    assert plan.by_role("GPU") == {"learner": 1, "generator": 1}
    assert "reference" not in seats_of(plan) and "critic rank 0" not in seats_of(plan)
    adapted = tiny_config("executor=ray", "model.lora.r=2", "algorithm.kl_coef=0.1")
    assert "reference" not in seats_of(plan_seats(adapted, "cuda", "nccl")), "the learner is its own reference"


def test_a_safety_classifier_needs_a_gpu_as_a_reward_model_does(tiny_config):
    safety = tiny_config("executor=ray", "device=cuda", *VLLM, "safety.path=toxic")
    assert plan_seats(safety, "cuda", "nccl").by_role("GPU") == {"learner": 1, "generator": 1, "reward": 1}


@pytest.mark.parametrize(("args", "gpus"), [
    ("{model: judge}", 1), ("{model: judge, device: cuda}", 1), ("{model: judge, device: cpu}", 0),
    ("{model: judge, endpoint: 'http://judge:8000/v1'}", 0),
])  # fmt: skip
def test_an_ai_judge_of_the_reward_worker_needs_a_gpu(tiny_config, args, gpus):
    """Ray shows all GPUs to an actor that has asked for none: the judge would take the first."""
    config = tiny_config("executor=ray", *VLLM, f"rewards.0={{function: judge, args: {args}}}")
    assert plan_seats(config, "cuda", "nccl").by_role("GPU").get("reward", 0) == gpus


@pytest.mark.parametrize(("args", "gpus"), [("{path: x, device: 'cuda:0'}", 1), ("{path: x}", 0)])
def test_a_classifier_that_asks_for_one_gets_a_gpu(tiny_config, args, gpus):
    config = tiny_config("executor=ray", *VLLM, f"rewards.0={{function: classifier, args: {args}}}")
    assert plan_seats(config, "cuda", "nccl").by_role("GPU").get("reward", 0) == gpus


def test_replicas_have_a_seat_each(tiny_config):
    several = ("reference.count=2", "reward.count=3", "reward_model.path=judge", "algorithm.kl_coef=0.1")
    plan = plan_seats(tiny_config("executor=ray", *VLLM, *several), "cuda", "nccl")
    names = ["reference 0", "reference 1", "reward 0", "reward 1", "reward 2"]
    assert seats_of(plan) == {
        "learner rank 0": (0, 1), "generator 0": (1, 1), **{name: (2 + i, 1) for i, name in enumerate(names)}
    }  # fmt: skip
    shared = tiny_config(*SHARDED, *VLLM, *several, "learner.world_size=3", "ray.colocate=true")
    borrowed = {s.name: s.borrows for s in plan_seats(shared, "cuda", "cuda_ipc").seats if s.name in names}
    assert borrowed == {name: (f"learner rank {name[-1]}",) for name in names}, "on different GPUs"


def test_ranks_of_each_reference_have_a_seat_each(tiny_config):
    ranks = ("reference.count=2", "reference.world_size=2", "algorithm.kl_coef=0.1")
    names = [f"reference {i} rank {j}" for i in range(2) for j in range(2)]
    plan = plan_seats(tiny_config("executor=ray", *VLLM, *ranks), "cuda", "nccl")
    assert [seat.name for seat in plan.seats if seat.gpus == 1][2:] == names
    shared = tiny_config(*SHARDED, *VLLM, *ranks, "learner.world_size=4", "ray.colocate=true")
    borrowed = {s.name: s.borrows for s in plan_seats(shared, "cuda", "cuda_ipc").seats if s.name in names}
    assert borrowed == {name: (f"learner rank {i}",) for i, name in enumerate(names)}
    alone = plan_seats(tiny_config("executor=ray", "reference.world_size=2", "algorithm.kl_coef=0.1"), "cpu", "nccl")
    assert {"reference rank 0", "reference rank 1"} < {seat.name for seat in alone.seats}


def test_half_gpus(tiny_config):
    plan = plan_seats(tiny_config("executor=ray", *VLLM, "ray.gpus_per_worker=0.5"), "cuda", "nccl")
    assert plan.total("GPU") == 1.0


def test_colocated_workers_borrow_the_learners_gpus(tiny_config):
    config = tiny_config(
        *SHARDED, *VLLM, *PPO, "learner.world_size=4", "generator.count=2", "generator.tensor_parallel=2",
        "ray.colocate=true",
    )  # fmt: skip
    plan = plan_seats(config, "cuda", "cuda_ipc")
    assert plan.total("GPU") == 4 and [b["GPU"] for b in plan.bundles] == [2, 2]
    borrowed = {s.name: (s.bundle, s.borrows) for s in plan.seats if s.borrows}
    assert borrowed == {
        "generator 0": (0, ("learner rank 0", "learner rank 1")),
        "generator 1": (1, ("learner rank 2", "learner rank 3")),
        "critic rank 0": (0, ("learner rank 0",)),
        "reference": (0, ("learner rank 0",)),
    }


@pytest.mark.parametrize(("overrides", "device", "transport"), [
    ((), "cpu", "shared_memory"),
    (VLLM, "cpu", "shared_memory"),
    (("generator.engine=hf",), "cuda", "shared_memory"),  # Transformers' generate has no CUDA receiver
    (VLLM, "cuda", "nccl"),
    ((*VLLM, "ray.gpus_per_worker=0.5"), "cuda", "shared_memory"),  # two processes on one GPU: NCCL refuses that
    ((*VLLM, "ray.colocate=true"), "cuda", "cuda_ipc"),
    ((*VLLM, "ray.colocate=true"), "cpu", "shared_memory"),
    ((*VLLM, "sync.transport=shared_memory"), "cuda", "shared_memory"),
])  # fmt: skip
def test_transport(tiny_config, overrides, device, transport):
    config = tiny_config("executor=ray", "device=auto", *overrides)
    assert choose_transport(config.sync, config.generator, config.ray, device) == transport


THREE_GPUS = Placement([
    Seat("learner rank 0", 0, 1, 1.0), Seat("learner rank 1", 1, 1, 1.0), Seat("generator 0", 2, 1, 1.0),
])  # fmt: skip


def test_too_few_gpus():
    with pytest.raises(PlacementError) as caught:
        check_fit(THREE_GPUS, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], colocated=False)
    assert str(caught.value).startswith("ray: the run needs 3 GPUs (learner 2, generator 1), the cluster has 2; ")
    assert "set ray.colocate=true" in str(caught.value)
    check_fit(THREE_GPUS, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}], colocated=False)


def test_too_few_cpus():
    with pytest.raises(PlacementError, match=r"needs 3 CPUs \(learner 2, .*, the cluster has 2; lower ray.cpus"):
        check_fit(THREE_GPUS, [{"CPU": 2.0, "GPU": 4.0}], colocated=True)


def test_a_bundle_must_fit_one_machine():
    plan = Placement([Seat("generator 0", 0, 1, 4.0)])
    with pytest.raises(PlacementError, match="4 GPUs must lie on one machine, the largest has 2"):
        check_fit(plan, [{"CPU": 8.0, "GPU": 2.0}] * 2, colocated=False)


def test_a_worker_without_cpu_share_still_has_a_bundle(tiny_config):
    plan = plan_seats(tiny_config("executor=ray", "ray.cpus_per_worker=0"), "cpu", "shared_memory")
    assert all(bundle["CPU"] > 0 for bundle in plan.bundles)


def test_what_a_run_occupies(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 2.0})
    on = {"learner rank 0": "node-a", "reward": "node-b", "generator 0": "node-a"}
    crew = SimpleNamespace(workers=[Worker(name, None, node) for name, node in on.items()])
    assert _devices(crew, THREE_GPUS, "cuda") == {"devices": 3.0, "device_name": "H100"}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"accelerator_type:H100": 1.0, "accelerator_type:L4": 1.0})
    assert _devices(crew, THREE_GPUS, "cuda")["device_name"] is None, "two kinds have no common peak"
    assert _devices(crew, THREE_GPUS, "cpu") == {"devices": 2.0, "device_name": "cpu"}, "machines"


class Forming:
    """A cluster of one machine with 4 CPUs; others join while a placement group is waited for, each with 4."""

    def __init__(self, monkeypatch, joins: int) -> None:
        self.machines, self.joins, self.asked = 1, joins, []
        monkeypatch.setattr(placement_module, "placement_group", self.ask)
        monkeypatch.setattr(placement_module, "remove_placement_group", lambda group: None)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}] * self.machines)
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 4.0 * self.machines})

    def ask(self, bundles, strategy):
        self.asked.append(bundles)
        return self

    def wait(self, seconds: float) -> bool:
        """As Ray's: whether there is room."""
        if len(self.asked) == 1 and seconds > placement_module.AT_ONCE_S:
            self.machines += self.joins
        return 4 * self.machines >= sum(bundle["CPU"] for bundle in self.asked[0])


TWO_MACHINES = Placement([Seat("learner rank 0", 0, 3.0), Seat("learner rank 1", 1, 3.0)])


def test_machines_that_are_still_joining_are_waited_for(monkeypatch):
    cluster, lines = Forming(monkeypatch, joins=1), []
    with placed(TWO_MACHINES, 300, False, lines.append, joining=True) as group:
        assert group is cluster and cluster.asked == [[{"CPU": 3.0}, {"CPU": 3.0}]]
    assert lines == [
        "waiting for machines to join: the run needs 6 CPUs (learner 6), the cluster has 4; lower ray.cpus_per_worker, "
        "or add machines"
    ]


def test_when_nobody_joins_what_is_lacking_is_said(monkeypatch):
    Forming(monkeypatch, joins=0)
    with (
        pytest.raises(PlacementError, match="needs 6 CPUs .*has 4.*no more machines have joined within 7 s"),
        placed(TWO_MACHINES, 7, False, joining=True),
    ):
        pass


def test_a_cluster_that_nobody_can_join_is_refused_at_once(monkeypatch):
    cluster = Forming(monkeypatch, joins=1)
    with pytest.raises(PlacementError, match="needs 6 CPUs"), placed(TWO_MACHINES, 300, False):
        pass
    assert cluster.asked == []
