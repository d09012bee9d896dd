from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.scratch import build_scratch

KINDS = ["qwen2", "gpt2", "lstm"]
SMALL = {"vocab_size": 20, "hidden_size": 16, "layers": 2, "heads": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_weights_and_the_global_random_state_is_untouched(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_scratch(kind, **SMALL, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = build_scratch(kind, **SMALL, seed=7).state_dict()
    other = build_scratch(kind, **SMALL, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_parameter_counts_by_hand():
    # Qwen2, H=16, 2 layers, I=48: embedding 20*16; a layer: q,k,v (16*16+16 each), o 16*16, mlp 3*16*48, 2 norms.
    layer = 3 * (16 * 16 + 16) + 16 * 16 + 3 * 16 * 48 + 2 * 16
    tied = build_scratch("qwen2", **SMALL, intermediate_size=48)
    assert sum(p.numel() for p in tied.parameters()) == 20 * 16 + 2 * layer + 16
    untied = build_scratch("qwen2", **SMALL, intermediate_size=48, tie_embeddings=False)
    assert sum(p.numel() for p in untied.parameters()) == 2 * 20 * 16 + 2 * layer + 16
    # LSTM: a layer has 4 gates of (H inputs + H state + 2 biases).
    lstm = build_scratch("lstm", **SMALL)
    assert sum(p.numel() for p in lstm.parameters()) == 20 * 16 + 2 * 4 * 16 * (16 + 16 + 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load_give_the_same_model(kind, tie, tmp_path):
    model = build_scratch(kind, **SMALL, tie_embeddings=tie, seed=1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    tensors = loaded.state_dict()
    shared = loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    assert shared == tie
    assert "lm_head.weight" in tensors


@pytest.mark.parametrize("kind", KINDS)
def test_no_dropout_and_no_bos(kind):
    model = build_scratch(kind, **SMALL, eos_token_id=2, pad_token_id=1)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id) == (2, 1, None)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(model.train()(ids).logits, model.train()(ids).logits)


@pytest.mark.parametrize(
    ("kind", "shape", "word"),
    [
        ("rnn", {}, "qwen2"),
        ("qwen2", {"hidden_size": 15}, "heads"),
        ("qwen2", {"hidden_size": 6, "heads": 2}, "even"),
        ("lstm", {"intermediate_size": 8}, "intermediate_size"),
    ],
)
def test_impossible_shapes_are_refused(kind, shape, word):
    with pytest.raises(ConfigError, match=word):
        build_scratch(kind, **{**SMALL, **shape})
