"""What a run has cost, counted by hand."""

import pytest
import torch

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.models.flops import PEAK_TFLOPS, measured_flops, peak_flops
from rlhf_ray.models.size import Size
from rlhf_ray.roles.batch import Rows
from rlhf_ray.run.cost import Spent, Workload, passes_a_step, spent_before
from rlhf_ray.run.directory import RunDirectory

# 10 tokens, prompts included.
ROWS = Rows(
    prompt_id=(0, 0), lengths=(6, 4), response_lengths=(4, 2), truncated=(False, False), weight_version=(0, 0),
    prompt_lengths=(2, 2), prompt_digests=(8, 8),
)  # fmt: skip
FULL, LORA = Size(100, 100), Size(100, 20)


def settings(**changes) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, **changes})


@pytest.mark.parametrize(("changes", "policy", "step", "operations"), [
    ({}, FULL, 0, 2 * 100 + 6 * 100),  # generate, train
    ({"learner": {"epochs": 3}}, FULL, 0, 2 * 100 * 2 + 6 * 100 * 3),  # and the log-probabilities before the update
    ({"algorithm": {"kl_coef": 0.1}}, FULL, 0, 2 * 100 * 2 + 6 * 100),  # and the reference
    ({}, LORA, 0, 2 * 80 + 4 * 100),  # adapters are merged where it generates
    # reference and old log-probabilities; the critic's values and its two epochs; the policy rests in step 0
    ({"algorithm": {"name": "ppo"}, "critic": {"epochs": 2, "warmup_steps": 1}}, FULL, 0,
     2 * 100 * 3 + 50 * (2 + 6 * 2)),
    ({"algorithm": {"name": "ppo"}, "critic": {"epochs": 2, "warmup_steps": 1}}, FULL, 1,
     2 * 100 * 3 + 50 * (2 + 6 * 2) + 6 * 100 * 4),
])  # fmt: skip
def test_utilisation(changes, policy, step, operations):
    workload = Workload(policy, Size(50, 50), devices=2, peak_flops=1000.0, passes=passes_a_step(settings(**changes)))
    assert workload.mfu(ROWS, step, 4.0) == pytest.approx(10 * operations / (4 * 2 * 1000))


def test_utilisation_is_not_guessed():
    passes = passes_a_step(settings(algorithm={"name": "ppo"}))
    assert Workload(FULL, None, peak_flops=1.0, passes=passes).mfu(ROWS, 0, 1.0) is None, "the critic's size"
    assert Workload(FULL, FULL, passes=passes).mfu(ROWS, 0, 1.0) is None, "the device"
    assert Workload(None, FULL, peak_flops=1.0, passes=passes).mfu(ROWS, 0, 1.0) is None, "the policy's size"


def test_the_parts_of_a_run_add_up(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert spent_before(run) == Spent(0, 0)
    run.log_metrics(1, {"cost/hours": 0.5, "cost/device_hours": 2.0})
    run.log_metrics(2, {"cost/hours": 1.0, "cost/device_hours": 4.0})
    assert spent_before(run) == Spent(3600, 4), "killed: what the last row says"
    run.write_summary({"seconds": 5400.0, "device_hours": 6.0})
    assert spent_before(run) == Spent(5400, 6), "ended: what the summary says"
    run.rewind(1, seconds=5400.0, device_hours=6.0)
    assert spent_before(run) == Spent(5400, 6), "resumed and killed again: the rows and the summary are gone"
    assert Spent(5400, 6).plus(1800, 4) == Spent(7200, 8)


def test_peaks_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak_flops("NVIDIA L40S", torch.bfloat16) == 362e12 and peak_flops("L4", torch.bfloat16) == 121e12
    assert peak_flops("Tesla T4", torch.bfloat16) is None, "it has no such units"
    assert peak_flops("NVIDIA A10G", torch.bfloat16) is None, "not an A10: unknown is not guessed"
    assert all(low is None or low > high for low, high in PEAK_TFLOPS.values())


def test_a_cpu_is_measured_once_and_keeps_its_threads():
    threads = torch.get_num_threads()
    first = peak_flops("cpu", torch.float32)
    assert 1e8 < first < 1e15 and peak_flops("cpu", torch.float32) == first
    assert torch.get_num_threads() == threads
    assert measured_flops.cache_info().currsize >= 1
