"""Classifiers made from other models: the backbone is kept, the head depends on the seed, the first layers can rest."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.classifiers import freeze_layers, head_names, load_classifier
from rlhf_ray.models.pretrained import exported_state
from rlhf_ray.models.scratch import build_scratch, build_scratch_classifier
from rlhf_ray.models.skeleton import Filled, skeleton
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.models.train_state import TrainState

SHAPE = {"vocab_size": 11, "hidden_size": 16, "layers": 3, "max_length": 16}


def heads(kind: str) -> dict[str, int]:
    return {} if kind == "lstm" else {"heads": 2}


@pytest.fixture
def policy(tmp_path):
    def make(kind: str) -> str:
        build_scratch(kind, **SHAPE, **heads(kind)).save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "lstm"])
def test_a_policy_becomes_a_reward_model(policy, kind):
    folder, options = policy(kind), {"labels": ["score"], "pad_token_id": 0}
    state = torch.random.get_rng_state()
    one, same, other = (load_classifier(folder, seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state is left as it was"
    assert torch.equal(one.score.weight, same.score.weight) and not torch.equal(one.score.weight, other.score.weight)
    policy_state = build_scratch(kind, **SHAPE, **heads(kind)).state_dict()
    shared = [name for name in one.state_dict() if name in policy_state]
    assert len(shared) >= 5 and all(torch.equal(one.state_dict()[name], policy_state[name]) for name in shared)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "lstm"])
def test_the_score_is_read_at_the_last_real_token(policy, kind):
    model = load_classifier(policy(kind), labels=["score"], pad_token_id=0, seed=0)
    alone = model(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3, dtype=torch.long)).logits
    padded = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 5, 6, 7]])
    together = model(input_ids=padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(together[:1], alone)
    assert together.shape == (2, 1) and not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("kind", ["qwen2", "lstm"])
@pytest.mark.parametrize("trust", [False, True])
def test_a_skeleton_has_the_labels_of_the_training_and_not_those_of_its_base(policy, tmp_path, kind, trust):
    folder = policy(kind)
    model = load_classifier(folder, labels=["score"], pad_token_id=3, seed=0, trust_remote_code=trust)
    TorchEngine(model).save(tmp_path / "state")
    state = TrainState(tmp_path / "state")
    made = skeleton(state, folder, classifies=True, trust_remote_code=trust)
    assert (made.config.num_labels, made.config.pad_token_id) == (1, 3)
    weights = {name: tensor.clone() for name, tensor in exported_state(made, gather=Filled(made, state))}
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_labels_have_names(policy):
    model = load_classifier(policy("qwen2"), labels=["bad", "good"], pad_token_id=0, seed=0)
    assert model.config.id2label == {0: "bad", 1: "good"} and head_names(model) == ["score"]
    with pytest.raises(ModelError, match="no such folder"):
        load_classifier("./gone", labels=["bad", "good"], pad_token_id=0, seed=0)


@pytest.mark.parametrize(("kind", "first", "after"), [
    ("bert", "bert.embeddings.", "bert.encoder.layer.2."),
    ("gpt2", "transformer.wte.", "transformer.h.2."),
    ("qwen2", "model.embed_tokens.", "model.layers.2."),
])  # fmt: skip
def test_embeddings_and_first_layers_are_frozen(kind, first, after):
    model = build_scratch_classifier(kind, labels=["bad", "good"], **SHAPE, heads=2)
    frozen = freeze_layers(model, 2)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert frozen[0].startswith(first) and learning[0].startswith(after)
    assert set(frozen).isdisjoint(learning) and len(frozen) + len(learning) == len(list(model.parameters()))


def test_freezing_all_layers_leaves_what_stands_after_them():
    model = build_scratch_classifier("bert", labels=["bad", "good"], **SHAPE, heads=2)
    freeze_layers(model, 3)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert freeze_layers(build_scratch_classifier("bert", labels=["a", "b"], **SHAPE, heads=2), 0) == []


def test_layers_that_are_not_there():
    model = build_scratch_classifier("bert", labels=["bad", "good"], **SHAPE, heads=2)
    with pytest.raises(ConfigError, match="frozen_layers=4: BertForSequenceClassification has 3 layers"):
        freeze_layers(model, 4)
    recurrent = build_scratch_classifier("lstm", labels=["bad", "good"], **SHAPE)
    with pytest.raises(ConfigError, match="has no list of 3 layers"):
        freeze_layers(recurrent, 1)
