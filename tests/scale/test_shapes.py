"""Named shapes have as many parameters as their makers publish; unknown names are refused with those that there are."""

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.scale.devices import DEVICES, find_device
from rlhf_ray.scale.make_case import size_of_shape
from rlhf_ray.scale.rates import Rates, read_rates
from rlhf_ray.scale.shapes import require_shape, shape_named

# Of the safetensors on the Hub, as each model's page has it.
PUBLISHED = {
    "qwen2-0.5b": 494_032_768, "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304, "qwen2-7b": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648, "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "llama-70b": 70_553_706_496, "llama2-7b": 6_738_415_616,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert size_of_shape(require_shape(name, "")).parameters == PUBLISHED[name]


def test_a_name_is_a_family_and_a_size():
    assert shape_named("Qwen/Qwen2.5-7B-Instruct").hidden_size == 3584
    assert shape_named("meta-llama/Llama-3.3-70B-Instruct").num_hidden_layers == 80
    assert shape_named("someone/qwen2-7b-tuned") is None
    with pytest.raises(ConfigError, match=r"why \(did you mean qwen2-7b\?\); name a folder .* or one of qwen2-0.5b"):
        require_shape("qwen2-8b", "why")


def test_devices():
    assert find_device("NVIDIA H100").name == "H100"
    with pytest.raises(ConfigError, match=r"--device h101: .* \(did you mean h100\?\)"):
        find_device("h101")
    for device in DEVICES.values():
        assert device.peak(torch.bfloat16) > device.peak(torch.float32) > device.bandwidth > device.link


def test_machines_are_of_one_size(case_of):
    assert case_of("qwen2-0.5b", 6, nodes=2).device.in_a_node == 3
    with pytest.raises(ConfigError, match="--nodes 4 does not divide --devices 6"):
        case_of("qwen2-0.5b", 6, nodes=4)


def test_means_lie_below_the_longest(case_of):
    case = case_of("qwen2-0.5b", 1, answer_tokens=100)
    assert (case.prompt_tokens, case.answer_tokens) == (1024, 100)
    with pytest.raises(ConfigError, match="--answer-tokens 513 is a mean, and rollout.max_new_tokens allows 1 to 512"):
        case_of("qwen2-0.5b", 1, answer_tokens=513)


def test_rates_are_read_and_checked(tmp_path):
    file = tmp_path / "rates.yaml"
    file.write_text("train_mfu: 0.5\nprice_per_device_hour: 2\n")
    assert read_rates(file) == Rates(train_mfu=0.5, price_per_device_hour=2)
    file.write_text("train_mfo: 0.5\n")
    with pytest.raises(ConfigError, match="train_mfu"):
        read_rates(file)


def test_a_critic_and_judges_have_their_own_sizes(case_of):
    case = case_of("qwen2-7b", 8, "algorithm.name=ppo", "critic.path=qwen2-0.5b", "reward_model.path=qwen2-1.5b")
    assert case.critic.parameters == PUBLISHED["qwen2-0.5b"] and case.judges == 1_543_714_304
    with pytest.raises(ConfigError, match="the size of ./nowhere is unknown"):
        case_of("qwen2-7b", 8, "reward_model.path=./nowhere")
