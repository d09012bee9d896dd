"""Phases of a step: worked by hand from rates, and against published runs."""

from dataclasses import replace

import pytest

from rlhf_ray.scale.layout import Layout
from rlhf_ray.scale.rates import Rates
from rlhf_ray.scale.times import generate, times_of, update, weight_sync

SHORT = ("rollout.prompts_per_step=4", "rollout.group_size=4", "data.max_prompt_tokens=100",
         "rollout.max_new_tokens=50")  # fmt: skip


def test_decoding_reads_weights_and_keys(case_of):
    case = case_of("llama-8b", 2, *SHORT)
    case = replace(case, rates=Rates(decode_bandwidth=0.5, launch_ms=0, forward_mfu=1))
    phase = generate(case, Layout(False, 1, 1, 1))
    N, read = 8_030_261_248, 0.5 * 3350e9
    weights = 50 * 2 * N / read  # 50 steps of 16 rows
    keys = 16 * 50 * (100 + 25) * 131072 / read  # the mean context of a token: its prompt and half of the answer
    prompts = 4 * 100 * (2 * N + 4 * 32 * 4096 * 50) / 989e12  # 4 prompts, for a group's is read once
    assert phase.seconds == pytest.approx(weights + keys + prompts)
    assert generate(case, Layout(False, 2, 1, 1)).seconds < phase.seconds


def test_rows_that_do_not_fit_wait(case_of):
    case = case_of("llama-8b", 2, *SHORT, "generator.engine_args={max_num_seqs: 8}", "generator.engine=vllm")
    whole = case_of("llama-8b", 2, *SHORT)
    assert "100 decoding steps of 8 rows" in generate(case, Layout(False, 1, 1, 1)).why
    assert "50 decoding steps of 16 rows" in generate(whole, Layout(False, 1, 1, 1)).why


def test_an_update_by_hand(case_of):
    case = replace(case_of("llama-8b", 4, *SHORT), rates=Rates(train_mfu=0.5, link_share=1))
    N, layers, width = 8_030_261_248, 32, 4096
    tokens = 16 * 150 / 2  # of each of two ranks
    attention = 4 * layers * width * 75
    computing = tokens * (6 * N + 3 * attention) / (0.5 * 989e12)
    # one micro-batch: gradients in float32 are reduced, weights in bfloat16 gathered; half of each is here already
    talking = (4 * N + 2 * N) / 2 / 450e9
    stepping = N / 2 * 36 / 3350e9
    phase = update(case, Layout(False, 1, 1, 2), "learner")
    assert phase.seconds == pytest.approx(computing + talking + stepping)
    again = update(case, Layout(False, 1, 1, 2, checkpointing=True), "learner")
    more = tokens * (2 * N + attention) / (0.5 * 989e12)
    assert again.seconds == pytest.approx(computing + more + talking + stepping)


def test_ranks_on_several_machines_talk_over_the_network(case_of):
    case = case_of("llama-8b", 16, *SHORT)
    inside, across = (
        update(replace(case, rates=Rates(train_mfu=1)), Layout(False, 1, 1, ranks), "learner") for ranks in (8, 16)
    )
    # 6 bytes a parameter, at 450 and at 50 GB/s, of which 70 % are reached
    assert f"talking {6 * 8_030_261_248 * 7 / 8 / (450e9 * 0.7):.3g} s" in inside.why
    assert f"talking {6 * 8_030_261_248 * 15 / 16 / (50e9 * 0.7):.3g} s" in across.why


def test_weights_are_gathered_and_sent(case_of):
    case, sent = replace(case_of("llama-8b", 8, *SHORT), rates=Rates(link_share=1)), 2 * 8_030_261_248
    assert weight_sync(case, Layout(False, 4, 1, 4)).seconds == pytest.approx(sent / 450e9)
    assert weight_sync(case, Layout(False, 4, 1, 4, zero_stage=3)).seconds == pytest.approx(2 * sent / 450e9)
    assert weight_sync(case, Layout(True, 8, 1, 8)).seconds == pytest.approx(sent / 3350e9)


def test_measured_rates_go_first(case_of):
    case = case_of("llama-8b", 2, *SHORT)
    case = replace(case, rates=Rates(generate_tokens_per_s=1000, train_tokens_per_s=500, reward_s=3))
    times = times_of(case, Layout(False, 2, 1, 2))
    assert times.of("generate") == pytest.approx(8 * 50 / 1000)
    assert times.of("update") == pytest.approx(8 * 150 / 500)
    assert times.of("reward") == pytest.approx(3)


def test_generation_overlaps_where_the_run_may_be_stale(case_of):
    case = case_of("llama-8b", 4, *SHORT, "executor=ray", "rollout.max_staleness=1", "algorithm.correction=truncate")
    times = times_of(case, Layout(False, 2, 1, 2))
    rest = sum(phase.seconds for phase in times.phases if phase.name != "generate")
    assert times.overlapped and times.step == pytest.approx(max(rest, times.of("generate")))


def test_columns_are_computed_side_by_side(case_of):
    case = case_of("llama-8b", 8, *SHORT, "algorithm.name=ppo")
    names = ("ref_logp", "values", "old_logp")
    apart = times_of(case, Layout(False, 2, 1, 2, critic_ranks=2, reference=1))
    columns = [apart.of(name) for name in names]
    others = sum(phase.seconds for phase in apart.phases if phase.name not in names)
    assert min(columns) > 0 and apart.step == pytest.approx(others + max(columns))
    together = times_of(case, Layout(True, 2, 1, 2, critic_ranks=2, reference=1))
    assert together.step == pytest.approx(sum(phase.seconds for phase in together.phases))


# ---- published -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "layers", "hidden", "parameters", "rows", "length", "devices", "tokens_s", "checkpointing"),
    [  # MosaicML LLM Foundry, scripts/train/benchmarking, H100 80GB bfloat16: HFU, ..., tokens/s a device
        (0.4644, 32, 4096, 6_658_859_008, 48, 2048, 8, 10_643, False),
        (0.5390, 32, 4096, 6_667_247_616, 256, 4096, 8, 8_611, True),
        (0.3980, 40, 5120, 12_853_954_560, 16, 2048, 8, 4_792, False),
        (0.5676, 80, 8192, 64_862_437_376, 2048, 2048, 64, 1_039, True),
    ],
)
def test_training_of_llm_foundry(
    case_of, share, layers, hidden, parameters, rows, length, devices, tokens_s, checkpointing
):  # fmt: skip
    """Their utilisation in, their tokens a second out: the operations are counted alike (their attention is not halved,
    and their network is faster than the passes)."""
    from rlhf_ray.models.size import Size

    case = case_of("llama2-7b", devices, f"rollout.prompts_per_step={rows}", "rollout.group_size=1",
                   "algorithm.name=reinforce", f"rollout.max_new_tokens={length // 2}",
                   f"data.max_prompt_tokens={length // 2}")  # fmt: skip
    shape = replace(case.shape, layers=layers, hidden=hidden, heads=hidden // 128, kv_heads=hidden // 128)
    case = replace(case, policy=Size(parameters, parameters), shape=shape, rates=Rates(train_mfu=share))
    layout = Layout(False, 1, 1, devices, zero_stage=3, checkpointing=checkpointing, microbatch=8 * length)
    phase = update(case, layout, "learner")
    assert rows * length / phase.seconds / devices == pytest.approx(tokens_s, rel=0.10)


def test_a_step_of_nemo_rl(case_of):
    """NVIDIA NeMo RL 0.4, performance summary: GRPO, Llama-3.1-8B, 16 H100s, 2,048 answers of 1,060 tokens on average
    with their prompts, at most 4,096; four minibatches, on-policy: 97.7 s a step, all phases."""
    case = case_of(
        "llama-8b", 16, "rollout.prompts_per_step=64", "rollout.group_size=32", "learner.minibatches=4",
        "data.max_prompt_tokens=512", "rollout.max_new_tokens=3584", "generator.enforce_eager=false",
        prompt_tokens=150, answer_tokens=910,
    )  # fmt: skip
    layout = Layout(True, 16, 1, 16, zero_stage=2, checkpointing=True, microbatch=8192, utilization=0.6)
    assert times_of(case, layout).step == pytest.approx(97.7, rel=0.3)
