from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from rlhf_ray.errors import ModelError
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.scratch import build_scratch

KINDS = ["qwen2", "gpt2", "lstm"]
IDS = torch.tensor([[3, 7, 11, 4], [5, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def policy_of(kind):
    return build_scratch(kind, vocab_size=20, hidden_size=16, layers=2, heads=2, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_zero_and_then_reads_the_backbone(kind):
    policy = policy_of(kind)
    critic = ValueModel(policy.base_model).eval()
    assert torch.equal(critic(IDS, MASK).values, torch.zeros(2, 4))
    with torch.no_grad():
        critic.value_head.weight.copy_(torch.arange(16.0)[None])
        critic.value_head.bias.fill_(0.5)
    features_BTH = policy.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(critic(IDS, MASK).values, features_BTH @ torch.arange(16.0) + 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_round_trip(kind, tmp_path):
    critic = ValueModel(policy_of(kind).base_model).eval()
    torch.nn.init.normal_(critic.value_head.weight)
    critic.save_pretrained(tmp_path, state_dict=critic.state_dict())
    loaded = ValueModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS, MASK).values, critic(IDS, MASK).values)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(critic.backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_folder_becomes_a_critic(kind, tmp_path):
    policy = policy_of(kind)
    policy.save_pretrained(tmp_path)
    critic = ValueModel.from_pretrained(tmp_path)
    assert torch.equal(critic.backbone.get_input_embeddings().weight, policy.get_input_embeddings().weight)
    assert torch.equal(critic(IDS, MASK).values, torch.zeros(2, 4))


def test_values_are_float32_and_gradients_reach_the_backbone():
    critic = ValueModel(policy_of("qwen2").to(torch.bfloat16).base_model)
    assert critic.value_head.weight.dtype == torch.bfloat16
    assert critic(IDS, MASK).values.dtype == torch.float32
    critic.value_head.weight.data.fill_(1.0)
    critic.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    critic.train()(IDS, MASK).values.sum().backward()
    assert all(p.grad is not None for p in critic.parameters())


def test_refusals(tmp_path):
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        ValueModel.from_pretrained(tmp_path / "nowhere")
    policy_of("qwen2").save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load a backbone for the critic .critic.path."):
        ValueModel.from_pretrained(tmp_path / "policy")
    critic = ValueModel(policy_of("qwen2").base_model)
    with pytest.raises(ModelError, match="value_head"):
        critic.save_pretrained(tmp_path, state_dict={"lm_head.weight": torch.zeros(1)})
