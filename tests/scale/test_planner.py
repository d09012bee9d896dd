"""What is recommended, what is refused, and that the run would accept it."""

import pytest

from rlhf_ray.config.load import as_tree, config_of, on_device
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.scale.devices import GIB
from rlhf_ray.scale.layout import Layout
from rlhf_ray.scale.needs import host_bytes, needs_of
from rlhf_ray.scale.planner import plan_of, problems, warnings_of

pytestmark = pytest.mark.slow  # a second each

STEP = ("rollout.prompts_per_step=64", "rollout.group_size=8", "rollout.max_new_tokens=1024",
        "data.max_prompt_tokens=512", "algorithm.name=grpo")  # fmt: skip


def settled(config: RunConfig, layout: Layout) -> RunConfig:
    """The config with the plan's settings, as a user would give them."""
    given = [f"{name}={str(value).lower()}" for name, value in layout.settings(config).items()]
    return config_of(as_tree(config.model_dump(mode="json")), given, RunConfig, source="plan")


# The smallest numbers of devices that these models have been trained on in public are far inside these bounds.
@pytest.mark.parametrize("devices", [1, 8, 64, 512])
@pytest.mark.parametrize("model", ["qwen2-0.5b", "qwen2-7b", "llama-70b"])
def test_a_full_answer_for_three_sizes_on_four_clusters(case_of, model, devices):
    case = case_of(model, devices, *STEP)
    if (model, devices) == ("llama-70b", 1):
        with pytest.raises(ConfigError, match=r"70\.6B parameters do not fit 1 x H100 .*With \d+ of them it fits"):
            plan_of(case, as_written=False)
        return
    plan = plan_of(case, as_written=False)
    layout, times = plan.best.layout, plan.best.times
    assert 1 <= layout.devices <= devices
    for need in plan.best.needs:
        assert 0 < need.total <= need.room <= case.device.memory, need
    # No faster than if every device computed at its peak, no slower than a thousandth of that.
    tokens = 512 * (512 + 1024)
    ideal = 8 * case.policy.parameters * tokens / (layout.devices * case.device.peak(case.dtype))
    assert ideal < times.step < 1000 * ideal
    # Each of 1,024 decoding steps reads all weights; at the full bandwidth of all of a generator's devices.
    once = case.policy.parameters * 2 / layout.tensor_parallel / case.device.bandwidth
    assert times.of("generate") > 1024 * once
    assert times.step == pytest.approx(sum(phase.seconds for phase in times.phases))
    assert plan.best.device_hours == pytest.approx(layout.devices * times.step / 3600)
    assert len(plan.why) >= 2 and "most of a step" in plan.why[-1]
    run = settled(case.config, layout)
    assert on_device(run, "cuda") == run, "the run takes these settings"
    assert layout.settings(run) == {}, "and nothing is left to change"
    assert Layout.of(run).devices == layout.devices


def test_more_devices_are_never_slower_and_fewer_are_recommended_where_they_do(case_of):
    steps = [plan_of(case_of("qwen2-0.5b", n, *STEP), False).best for n in (1, 8, 64, 512)]
    assert all(later.times.step <= earlier.times.step * 1.03 for earlier, later in zip(steps, steps[1:], strict=False))
    assert steps[-1].layout.devices < 512, "512 answers do not fill 512 devices"


def test_a_layout_reserves_what_the_run_reserves(case_of):
    pytest.importorskip("ray")
    from rlhf_ray.remote.placement import choose_transport, plan_seats

    stale = ("executor=ray", "rollout.max_staleness=1", "algorithm.correction=truncate")
    for devices, overrides in (
        (8, ()), (8, ("algorithm.name=ppo",)), (16, stale), (8, ("reward_model.path=qwen2-0.5b",)),
    ):  # fmt: skip
        case = case_of("qwen2-1.5b", devices, *STEP, *overrides)
        layout = plan_of(case, False).best.layout
        run = settled(case.config, layout)
        transport = choose_transport(run.sync, run.generator, run.ray, "cuda")
        assert plan_seats(run, "cuda", transport).total("GPU") == layout.devices


def test_what_ranks_hold_together_is_counted_by_rank(case_of):
    pytest.importorskip("ray")
    from rlhf_ray.remote.placement import plan_seats

    shared = ("reference.count=2", "reference.world_size=2", "reward_model.path=qwen2-0.5b", "reward.world_size=3")
    case = case_of("qwen2-1.5b", 16, *STEP, "executor=ray", "algorithm.kl_coef=0.01", *shared)
    layout = Layout.of(case.config)
    assert layout.devices == plan_seats(case.config, "cuda", "nccl").total("GPU") == 1 + 1 + 2 * 2 + 3
    held = {need.role: (need.devices, need.parts["weights"]) for need in needs_of(case, layout)}
    assert held["reference"] == (4, case.policy.base * 2 // 2) and held["reward"] == (3, case.judges * 2 // 3)


def test_what_cannot_fit_is_refused_with_numbers(case_of):
    with pytest.raises(ConfigError) as refused:
        plan_of(case_of("llama-70b", 64, *STEP, "algorithm.kl_coef=0.01"), False)
    # A reference is whole on one device: 70,553,706,496 x 2 bytes are 131.4 GiB.
    assert "reference: 13" in str(refused.value) and "More of them would not help" in str(refused.value)
    assert "reference.world_size" in str(refused.value), "what a plan does not try, and a run can do"
    assert plan_of(case_of("llama-70b", 64, *STEP, "algorithm.kl_coef=0.01", device="mi300x"), False)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_refusal_names_the_devices_from_which_on_it_fits(case_of, devices):
    with pytest.raises(ConfigError, match="With 8 of them it fits"):
        plan_of(case_of("llama-70b", devices, *STEP), False)
    assert plan_of(case_of("llama-70b", 8, *STEP), False)


def test_memory_decides(case_of):
    wide = plan_of(case_of("qwen2-7b", 8, *STEP, device="h200"), False).best.layout
    tight = plan_of(case_of("qwen2-7b", 8, *STEP, device="h200", memory=24), False).best
    assert not wide.checkpointing and wide.offload == "none"
    assert tight.layout.checkpointing or tight.layout.offload == "optimizer"
    assert all(need.total <= need.room < 24 * GIB for need in tight.needs)


def test_host_memory_decides_about_offload(case_of):
    assert plan_of(case_of("qwen2-7b", 1, *STEP), False).best.layout.offload == "optimizer"
    with pytest.raises(ConfigError, match="host memory: 1"):
        plan_of(case_of("qwen2-7b", 1, *STEP, host_memory=100), False)


def test_loading_is_warned_of(case_of):
    layout = Layout(True, 1, 8, 8, zero_stage=3, offload="optimizer", checkpointing=True, microbatch=4096)
    # 8 ranks x 4 bytes x 70,553,706,496 parameters
    assert "loading takes 2103 GiB" in warnings_of(case_of("llama-70b", 8), layout)[0]
    assert warnings_of(case_of("llama-70b", 8, host_memory=4096), layout) == []


def test_the_layout_of_the_config_is_judged_as_it_is(case_of):
    own = ("executor=ray", "learner.engine=deepspeed", "learner.world_size=4", "generator.count=4")
    plan = plan_of(case_of("qwen2-7b", 8, *STEP, *own), as_written=True)
    option, wrong = plan.written
    assert (option.layout.ranks, option.layout.generators, option.layout.devices) == (4, 4, 8)
    assert wrong and wrong[0].startswith("learner: "), "16,384 tokens without checkpointing"
    fits = plan_of(case_of("qwen2-0.5b", 8, *STEP, *own), as_written=True)
    assert fits.written[1] == []


def test_a_separate_learner_by_hand(case_of):
    case = case_of("qwen2-0.5b", 8, *STEP)
    layout = Layout(False, 4, 1, 4, zero_stage=2, microbatch=4096)
    generator, learner = needs_of(case, layout)
    N = 494_032_768
    assert learner.parts["weights"] == 2 * N and learner.parts["optimiser"] == 12 * N // 4
    assert learner.parts["gradients"] == N and learner.devices == 4
    assert generator.parts["weights"] == 2 * N
    assert generator.parts["keys and values"] == 1536 * 2 * 24 * 2 * 64 * 2
    assert generator.room == int(0.8 * case.device.memory - GIB)
    assert problems(case, layout) == []


def test_qlora_learns_on_one_device(case_of):
    case = case_of("qwen2-7b", 8, *STEP, "model.lora={r: 16, quantize: nf4}")
    layout = plan_of(case, False).best.layout
    assert layout.ranks == 1 and layout.section("learner")["engine"] == "torch"
    # vLLM holds all 7,615,616,512 weights in 2 bytes, and keeps them in the host's memory while it sleeps.
    assert host_bytes(case, Layout(True, 1, 1, 1))["asleep"] == 2 * 7_615_616_512
