"""The dry run: numbers worked by hand, and no numbers where there are none."""

import pytest
import torch
import yaml

from rlhf_ray.config.load import load_config
from rlhf_ray.config.schema import CriticConfig, LearnerConfig
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.devices import Hardware
from rlhf_ray.models.memory import train_bytes
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.start.plan import (
    PlannedRole,
    Size,
    describe_plan,
    expected_hardware,
    human,
    model_size,
    planned_roles,
    saved_size,
)

CPU, GPU = Hardware("cpu", torch.float32), Hardware("cuda", torch.bfloat16)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({
        "model": {"path": "scratch:gpt2", "tokenizer": {"path": "scratch:char", "alphabet": "abcdefg"},
                  "scratch": {"hidden_size": 8, "layers": 1, "heads": 2, "max_length": 16}},
        "data": {"path": "task:arithmetic", "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8},
        "rewards": [{"function": "exact_answer"}],
    }))  # fmt: skip
    return lambda *overrides: load_config(path, overrides)


# 10 tokens (7 and 3 special ones): embedding 80, positions 128, two norms 32, final norm 16,
# attention 8*24+24 + 8*8+8 = 288, MLP 8*32+32 + 32*8+8 = 552
GPT2_PARAMETERS = 80 + 128 + 32 + 16 + 288 + 552


def test_parameters_are_counted_without_making_them(config):
    assert model_size(config()) == Size(GPT2_PARAMETERS, GPT2_PARAMETERS)
    untied = model_size(config("model.scratch.tie_embeddings=false"))
    assert untied.parameters == GPT2_PARAMETERS + 80
    assert model_size(config("model.tokenizer.path=scratch:word", "model.tokenizer.vocab_size=100")).parameters == (
        GPT2_PARAMETERS + 90 * 8
    ), "learned from the data: its bound"


def test_lora_trains_its_adapters_only(config):
    # r=2 beside 8->24, 8->8, 8->32 and 32->8
    adapters = 2 * (8 + 24) + 2 * (8 + 8) + 2 * (8 + 32) + 2 * (32 + 8)
    assert model_size(config("model.lora.r=2")) == Size(GPT2_PARAMETERS + adapters, adapters)
    one = model_size(config("model.lora={r: 2, target_modules: [c_attn]}"))
    assert one == Size(GPT2_PARAMETERS + 2 * 32, 2 * 32) and one.base == GPT2_PARAMETERS


def test_a_count_agrees_with_peft(config, tmp_path):
    from rlhf_ray.models.lora import apply_lora

    model = build_scratch("gpt2", vocab_size=10, hidden_size=8, layers=1, heads=2, max_length=16)
    model = apply_lora(model, r=2)
    size = model_size(config("model.lora.r=2"))
    assert sum(p.numel() for p in model.parameters()) == size.parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size.trained


def test_qlora_holds_its_linear_layers_in_4_bits(config):
    size = model_size(config("model.lora={r: 2, quantize: nf4}"))
    assert size.packed == 8 * 24 + 8 * 8 + 8 * 32 + 32 * 8
    # 900 of 1000 weights in 4.127 bits, 100 in 2 bytes; 100 trained: 4 + 4 + 8 bytes
    assert train_bytes(Size(1000, 100, 900), LearnerConfig(), torch.bfloat16) == 200 + 465 + 1600


@pytest.mark.parametrize(
    ("settings", "dtype", "expected"),
    [
        ({}, torch.float32, 1600),  # 4 weights + 4 gradients + 8 moments, times 100
        ({}, torch.bfloat16, 1800),  # 2 + 4 + 8, and 4 for the masters
        ({"engine": "deepspeed", "zero_stage": 0, "world_size": 2}, torch.float32, 1600),  # no masters
        ({"engine": "deepspeed", "zero_stage": 0, "world_size": 2}, torch.bfloat16, 200 + 400 + 600),  # runs as ZeRO-1
        ({"engine": "deepspeed", "zero_stage": 1, "world_size": 2}, torch.bfloat16, 200 + 400 + 600),
        ({"engine": "deepspeed", "zero_stage": 2, "world_size": 2}, torch.bfloat16, 200 + 200 + 600),
        ({"engine": "deepspeed", "zero_stage": 3, "world_size": 2}, torch.bfloat16, 100 + 200 + 600),
        ({"engine": "deepspeed", "zero_stage": 2, "world_size": 2, "offload": "optimizer"}, torch.bfloat16, 400),
        ({"engine": "deepspeed", "zero_stage": 3, "world_size": 2, "offload": "parameters"}, torch.bfloat16, 200),
    ],
)
def test_bytes_of_training(settings, dtype, expected):
    assert train_bytes(Size(100, 100), LearnerConfig(**settings), dtype) == expected


def test_frozen_weights_have_neither_gradients_nor_moments():
    assert train_bytes(Size(100, 10), CriticConfig(), torch.bfloat16) == 200 + 160


def test_only_the_roles_that_are_used(config):
    size = Size(100, 100)
    grpo = planned_roles(config("generator.engine=hf"), CPU, size)
    assert grpo == [
        PlannedRole("generator", "hf", 1, 1, 400),
        PlannedRole("learner", "torch", 1, 1, 1600),
        PlannedRole("reward", "functions", 1, 1, 0),
    ]
    ppo = planned_roles(config("algorithm.name=ppo"), CPU, size)
    assert [(role.name, role.bytes) for role in ppo] == [
        ("generator", 400), ("learner", 1600), ("reference", 400), ("critic", 1600), ("reward", 0),
    ]  # fmt: skip


def test_the_reward_holds_every_network_that_judges(config, monkeypatch):
    sizes = {"rm": Size(10, 10), "toxic": Size(5, 5), "somewhere": None}
    monkeypatch.setattr("rlhf_ray.start.plan.saved_size", lambda path, *_: sizes[path])
    both = planned_roles(config("reward_model.path=rm", "safety.path=toxic"), CPU, None)[-1]
    assert both == PlannedRole("reward", "model", 1, 1, 60)
    unknown = planned_roles(config("reward_model.path=rm", "safety.path=somewhere"), CPU, None)[-1]
    assert unknown == PlannedRole("reward", "model", 1, 1, None)


def test_a_cluster(config, monkeypatch):
    roles = planned_roles(
        config("executor=ray", "generator.engine=vllm", "generator.count=3", "generator.tensor_parallel=2",
               "learner.engine=deepspeed", "learner.world_size=4", "learner.zero_stage=3"),
        GPU, Size(1000, 1000),
    )  # fmt: skip
    assert roles[0] == PlannedRole("generator", "vllm", 3, 2, 1000)
    assert roles[1] == PlannedRole("learner", "deepspeed ZeRO-3", 4, 1, (2000 + 4000 + 12000) // 4)
    several = config("executor=ray", "algorithm.name=ppo", "reference.count=2", "reward.count=3")
    counts = {role.name: role.processes for role in planned_roles(several, CPU, Size(100, 100))}
    ranks = config("executor=ray", "algorithm.name=ppo", "reference.count=2", "reference.world_size=3")
    assert planned_roles(ranks, CPU, Size(100, 100))[2] == PlannedRole("reference", "hf ZeRO-3", 6, 1, 134)
    monkeypatch.setattr("rlhf_ray.start.plan.saved_size", lambda path, *_: Size(10, 10))
    judged = config("executor=ray", "reward_model.path=rm", "reward.count=2", "reward.world_size=3")
    assert planned_roles(judged, CPU, None)[-1] == PlannedRole("reward", "model ZeRO-3", 6, 1, 14)
    assert counts == {"generator": 1, "learner": 1, "reference": 2, "critic": 1, "reward": 3}


def test_a_model_folder_is_measured_by_its_config(tmp_path, config):
    folder = tmp_path / "policy"
    model = build_scratch("qwen2", vocab_size=50, hidden_size=16, layers=1, heads=2)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    count = sum(p.numel() for p in model.parameters())
    assert saved_size(str(folder), "policy") == Size(count, count)
    assert saved_size("nobody/has-this", "policy") is None


def test_the_whole_page(config):
    text = describe_plan(config("algorithm.name=ppo", "device=cpu"))
    assert "# placement: executor local, device cpu, float32" in text
    assert f"# policy scratch:gpt2: {GPT2_PARAMETERS:,} parameters" in text
    for line in ("generator  hf", "reference  hf", "critic     torch", "reward     functions"):
        assert line in text
    assert f"learner    torch            processes: 1         memory each: {human(16 * GPT2_PARAMETERS)}" in text
    assert all(line.startswith("#") for line in text.splitlines()), "after the config it is still YAML"


def test_an_unknown_model_is_said_to_be_unknown(config):
    text = describe_plan(config("model.path=nobody/has-this", "model.tokenizer.path=null", "device=cpu"))
    assert "policy nobody/has-this: size unknown" in text and "memory each: unknown" in text


def test_what_can_only_be_a_folder_is_looked_for(config):
    with pytest.raises(ModelError, match=r"\./nowhere: no such folder"):
        describe_plan(config("model.path=./nowhere", "model.tokenizer.path=null"))


def test_a_plan_for_gpus_may_be_made_without_them(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hardware, remark = expected_hardware(config("device=cuda"))
    assert hardware == GPU and "not on this machine: device=cuda: torch sees no CUDA device" in remark
    with pytest.raises(ConfigError, match="bfloat16 on MPS"):
        expected_hardware(config("device=mps", "dtype=bfloat16"))


def test_a_cluster_is_planned_with_the_bundles_of_the_run(config):
    pytest.importorskip("ray")
    separate = ("executor=ray", "device=cuda", "generator.engine=vllm", "generator.tensor_parallel=2")
    lines = describe_plan(config(*separate)).splitlines()
    start = lines.index("#   ray: 3 GPUs and 1.5 CPUs in 3 bundles, each on one machine; weights by nccl")
    assert lines[start + 1 : start + 4] == [
        "#     1 GPU, 0.5 CPU: learner rank 0", "#     2 GPU, 0.5 CPU: generator 0", "#     0.5 CPU: reward",
    ]  # fmt: skip
    shared = describe_plan(config("executor=ray", "device=cuda", "generator.engine=vllm", "ray.colocate=true"))
    assert "ray: 1 GPUs and 1.5 CPUs in 1 bundles" in shared and "generator 0 (shares)" in shared
    assert "weights by cuda_ipc" in shared


def test_a_plan_says_which_engine_auto_is(config, monkeypatch):
    monkeypatch.setattr("rlhf_ray.config.load.find_spec", lambda name: True)
    text = describe_plan(config("executor=ray", "device=cuda"))
    assert "generator  vllm" in text and "weights by nccl" in text
    assert "generator  hf" in describe_plan(config("executor=ray", "device=cpu"))


def test_a_dry_run_refuses_what_auto_does_not_fit(config, monkeypatch):
    monkeypatch.setattr("rlhf_ray.start.plan.choose_hardware", lambda *_, **__: Hardware("mps", torch.float32))
    with pytest.raises(ConfigError, match="which is mps here: 2 problems"):
        describe_plan(config("learner.engine=deepspeed", "generator.engine=vllm"))


def test_human():
    assert [human(n) for n in (None, 0, 1023, 1536, 3 << 20, 5 << 30, 1 << 41)] == [
        "unknown", "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 GiB", "2.0 TiB",
    ]  # fmt: skip


def test_a_word_tokenizer_is_not_trained_for_a_plan(config, monkeypatch):
    from rlhf_ray.start import plan

    monkeypatch.setattr(plan, "make_tokenizer", lambda *_: pytest.fail("it would read all the data"))
    assert model_size(config("model.tokenizer.path=scratch:bpe")) is not None
    assert len(build_tokenizer("char", ["abcdefg"])) == 10


def test_a_mixture_of_sources_is_on_the_page(config):
    data = "data={max_prompt_tokens: 8, eval_size: 300, sources: [{path: 'task:arithmetic', weight: 3}, " \
           "{path: b.jsonl, weight: 1}]}"  # fmt: skip
    assert "# sources: arithmetic 75.0% (task:arithmetic), b 25.0% (b.jsonl)\n" in describe_plan(config(data))
    without = config(data, "data.sources.0.weight=null", "data.sources.1.weight=null")
    assert "arithmetic (task:arithmetic), b (b.jsonl); no weights, so each row comes once" in describe_plan(without)
    assert "# sources" not in describe_plan(config())
