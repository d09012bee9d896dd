from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from rlhf_ray.models.lstm import LstmConfig, LstmForCausalLM
from rlhf_ray.models.scratch import build_scratch

SMALL = {"vocab_size": 20, "hidden_size": 16, "layers": 2}


@pytest.fixture
def model():
    model = build_scratch("lstm", **SMALL, tie_embeddings=False, seed=1)
    with torch.no_grad():  # larger weights, so that a wrong state would show
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def test_one_cell_by_hand():
    # H=1, all weights 0, so the gates are the biases' sigmoids; the forget bias starts at 1 and is irrelevant for c0=0.
    model = LstmForCausalLM(LstmConfig(vocab_size=3, hidden_size=1, num_hidden_layers=1, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.lstm.bias_ih_l0.copy_(torch.tensor([0.0, 1.0, 2.0, 0.0]))  # gates i, f, g, o
        model.lm_head.weight.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
    # c1 = sigmoid(0) tanh(2) = 0.482014, h1 = sigmoid(0) tanh(c1) = 0.223927
    # c2 = sigmoid(1) c1 + c1 = 0.834394, h2 = 0.5 tanh(c2) = 0.341414
    logits_BTV = model(torch.tensor([[0, 1]])).logits
    expected = torch.tensor([[0.223927, 0.447855, -0.223927], [0.341414, 0.682828, -0.341414]])
    torch.testing.assert_close(logits_BTV[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_does_not_touch_a_row(model, side):
    ids = torch.tensor([3, 7, 11, 4, 9])
    left, right = {"left": (3, 0), "right": (0, 3), "both": (2, 1)}[side]
    row = torch.cat([torch.full((left,), 19), ids, torch.full((right,), 19)])
    other = torch.tensor([5, 6, 7, 8, 9, 10, 11, 12])
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, 8 - right :] = 0
    together = model(torch.stack([row, other]), attention_mask=mask)
    alone, full = model(ids[None]), model(other[None])
    torch.testing.assert_close(together.logits[0, left : left + 5], alone.logits[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(together.logits[1], full.logits[0], atol=1e-6, rtol=0)
    state, own = together.past_key_values, alone.past_key_values
    torch.testing.assert_close(state.hidden_LBH[:, 0], own.hidden_LBH[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(state.cell_LBH[:, 0], own.cell_LBH[:, 0], atol=1e-6, rtol=0)


def test_an_empty_row_keeps_its_state_and_gives_finite_numbers(model):
    out = model(torch.tensor([[3, 4], [0, 0]]), attention_mask=torch.tensor([[1, 1], [0, 0]]))
    assert out.logits.isfinite().all()
    assert out.past_key_values.hidden_LBH[:, 1].abs().max() == 0


def test_the_state_continues_where_it_stopped(model):
    ids = torch.tensor([[3, 7, 11, 4, 9], [5, 5, 6, 2, 8]])
    whole = model(ids).logits
    first = model(ids[:, :2], use_cache=True)
    assert first.past_key_values.get_seq_length() == 2
    second = model(ids[:, 2:], past_key_values=first.past_key_values, attention_mask=torch.ones(2, 5))
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-6, rtol=0)
    assert second.past_key_values.get_seq_length() == 5
    assert model(ids, use_cache=False).past_key_values is None


def test_generate_reads_each_token_once_and_agrees_with_no_cache(model):
    ids = torch.tensor([[0, 0, 3, 7], [5, 9, 2, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    lengths: list[int] = []
    hook = model.model.lstm.register_forward_pre_hook(
        lambda _, args: lengths.append(
            args[0].batch_sizes.numel() if hasattr(args[0], "batch_sizes") else args[0].shape[1]
        )
    )
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    cached = model.generate(ids, **settings)
    assert lengths == [4, 1, 1, 1, 1, 1]
    hook.remove()
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    alone = model.generate(ids[:1, 2:], **{**settings, "attention_mask": mask[:1, 2:]})
    assert torch.equal(cached[0, 2:], alone[0])


def test_beam_search_reorders_the_state(model):
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([[3, 7, 2]])
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_labels_give_the_shifted_cross_entropy(model):
    ids = torch.tensor([[3, 7, 11]])
    out = model(ids, labels=torch.tensor([[-100, -100, 11]]))
    torch.testing.assert_close(out.loss, -out.logits[0, 1].log_softmax(-1)[11])


def test_gradient_checkpointing_is_refused(model):
    assert model.supports_gradient_checkpointing is False
    with pytest.raises(ValueError, match="set gradient_checkpointing to false"):
        model.gradient_checkpointing_enable()


@pytest.mark.slow
def test_a_stranger_without_this_package_can_load_the_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    torch.save(model(torch.tensor([[3, 7, 11]])).logits, tmp_path / "logits.pt")
    script = """
        import sys, torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/folder", trust_remote_code=True)
        assert not any(name.startswith("rlhf_ray") for name in sys.modules)
        logits = model(torch.tensor([[3, 7, 11]])).logits
        assert torch.equal(logits, torch.load(sys.argv[1] + "/logits.pt"))
        print(model.generate(torch.tensor([[3, 7]]), max_new_tokens=3, do_sample=False).shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        cwd=tmp_path,
        env={**__import__("os").environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
