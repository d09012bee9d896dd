from __future__ import annotations

import logging
import math
import stat
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlhf_ray.errors import CheckpointError, ConfigError, ModelError
from rlhf_ray.models import lora
from rlhf_ray.models.loading import load_policy, load_tokenizer
from rlhf_ray.models.lora import apply_lora, merged_state, quantization
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import char_tokenizer
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.models.trainable import switch_dropout_off

pytestmark = pytest.mark.slow  # peft alone takes seconds to import

IDS = torch.tensor([[3, 7, 11, 4]])


def small(kind, *, tie=True, seed=1):
    return build_scratch(kind, vocab_size=20, hidden_size=16, layers=2, heads=2, tie_embeddings=tie, seed=seed)


def with_adapters(kind, tie=True):
    model = apply_lora(small(kind, tie=tie), r=4, alpha=8, seed=2)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_w_plus_scaled_b_a_by_hand():
    model = apply_lora(small("qwen2"), r=1, alpha=3, target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.fill_(2.0)
        layer.lora_B["default"].weight.copy_(torch.arange(16.0)[:, None])
    merged = dict(merged_state(model))["model.layers.0.self_attn.q_proj.weight"]
    # alpha / r = 3; row i of B A is i * 2 everywhere
    assert torch.equal(merged, 6 * torch.arange(16.0)[:, None].expand(16, 16))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_merged_export_computes_what_the_adapted_model_computes(kind, tie):
    model = with_adapters(kind, tie)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in merged_state(model)}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plain = small(kind, tie=tie, seed=9)
    assert list(state) == list(plain.state_dict())  # the same names in the same order, tied ones twice
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-6, rtol=0)
    assert (model(IDS).logits - small(kind, tie=tie)(IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_fresh_adapters_change_nothing_and_only_they_train(kind):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns where fan_in_fan_out is wrong
        model = apply_lora(small(kind), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.eval()(IDS).logits, small(kind)(IDS).logits)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    again = dict(apply_lora(small(kind), seed=5).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in model.named_parameters())


def test_a_plain_model_exports_itself():
    model = small("gpt2")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in merged_state(model))


def test_bfloat16_is_merged_in_float32():
    model = with_adapters("qwen2").to(torch.bfloat16)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = dict(merged_state(model))["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16
    delta = (b @ a).float() * 2.0
    assert torch.equal(merged, (weight.float() + delta).to(torch.bfloat16))


def test_gather_surrounds_every_tensor():
    model = with_adapters("qwen2")
    seen: list[int] = []

    @contextmanager
    def gather(tensors):
        seen.extend(id(t) for t in tensors)
        yield

    list(merged_state(model, gather))
    assert {id(p) for p in model.parameters()} <= set(seen)


def test_clear_refusals():
    with pytest.raises(ConfigError, match="no linear layer"):
        apply_lora(small("lstm"))
    with pytest.raises(ConfigError, match="no_such_layer"):
        apply_lora(small("qwen2"), target_modules=["no_such_layer"])
    model = with_adapters("qwen2")
    model.merge_adapter()
    with pytest.raises(ModelError, match="already merged"):
        list(merged_state(model))


# ---- the adapter's folder ---------------------------------------------------------------------------------------


def adapted_folders(base: Path, folder: Path, **options) -> Path:
    """`model` and `adapter` in `folder`, of a policy that began as `base`."""
    engine = TorchEngine(apply_lora(load_policy(base, **options), r=4, alpha=8, seed=2))
    for step in range(2):  # B begins at 0: after one step, A has not moved
        engine.backward(engine(input_ids=IDS).logits[..., 3 + step].sum(), last=True)
        assert engine.step(1e-2) > 0
    tokenizer = char_tokenizer("abc")
    engine.save_pretrained(folder / "model", tokenizer)
    engine.save_pretrained(folder / "adapter", tokenizer, "adapter")
    return folder


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_peft_reads_the_adapter_and_computes_what_the_merged_model_does(kind, tmp_path, monkeypatch):
    import peft

    small(kind).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    adapted_folders(Path("base"), tmp_path)
    adapter = tmp_path / "adapter"
    with torch.no_grad():
        merged = load_policy(tmp_path / "model")(IDS).logits
        adapted = peft.PeftModel.from_pretrained(load_policy(tmp_path / "base"), adapter)
        torch.testing.assert_close(adapted(IDS).logits, merged, atol=1e-5, rtol=0)
        assert (merged - load_policy(tmp_path / "base")(IDS).logits).abs().max() > 0.01
        # The folder says what it belongs to, wherever whoever loads it stands; and brings the tokenizer.
        monkeypatch.chdir("/")
        found = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
        torch.testing.assert_close(found(IDS).logits, merged, atol=1e-5, rtol=0)
    assert load_tokenizer(adapter)("abc").input_ids == AutoTokenizer.from_pretrained(adapter)("abc").input_ids
    assert len({stat.S_IMODE(path.stat().st_mode) for path in adapter.iterdir()}) == 1
    names = load_file(adapter / "adapter_model.safetensors")
    assert names and all(".lora_" in name for name in names), "nothing of the model that it began with"


def test_the_adapter_of_a_diverged_policy_is_not_written(tmp_path):
    engine = TorchEngine(with_adapters("qwen2"))
    with torch.no_grad():
        next(p for n, p in engine.module.named_parameters() if "lora_B" in n)[0, 0] = math.nan
    with pytest.raises(ModelError, match="weights are not finite .the first is .*lora_B"):
        engine.save_pretrained(tmp_path / "adapter", None, "adapter")
    assert not (tmp_path / "adapter").exists()


# ---- QLoRA ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """`packed()`: a model whose linear layers are held in 4 bits, with adapters that do something."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("packed")
    for kind in ("qwen2", "gpt2"):
        model = build_scratch(kind, vocab_size=20, hidden_size=64, layers=2, heads=2, seed=1)
        model.save_pretrained(folder / kind)

    def make(targets="all-linear", seed=2, kind="qwen2"):
        model = load_policy(folder / kind, **quantization("nf4", torch.float32))
        model = apply_lora(model, r=4, alpha=8, target_modules=targets, seed=seed)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        switch_dropout_off(model)
        return model

    return make


@pytest.mark.parametrize(("kind", "targets"), [
    ("qwen2", "all-linear"), ("qwen2", ["q_proj"]), ("gpt2", "all-linear"), ("gpt2", ["c_fc"]),
])  # fmt: skip
def test_packed_weights_leave_as_numbers_with_their_adapters(packed, kind, targets):
    model = packed(targets, kind=kind)
    assert any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    state = dict(merged_state(model))
    plain = build_scratch(kind, vocab_size=20, hidden_size=64, layers=2, heads=2, seed=9)
    assert list(state) == list(plain.state_dict()) and {t.dtype for t in state.values()} == {torch.float32}
    original = build_scratch(kind, vocab_size=20, hidden_size=64, layers=2, heads=2, seed=1)
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
        assert (plain(IDS).logits - original(IDS).logits).abs().max() > 1e-3, "rounded to 4 bits, and adapted"


def test_a_packed_model_trains_is_saved_and_leaves_as_a_plain_folder(packed, tmp_path):
    engine = TorchEngine(packed())
    before = {name: tensor.clone() for name, tensor in engine.export()}

    def step() -> None:
        engine.backward(engine(input_ids=IDS).logits[..., 3].sum(), last=True)
        assert engine.step(1e-2) > 0

    step()
    engine.save(tmp_path / "checkpoint")
    after = {name: tensor.clone() for name, tensor in engine.export()}
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    other = TorchEngine(packed(seed=5))
    other.load(tmp_path / "checkpoint")
    assert all(torch.equal(tensor, after[name]) for name, tensor in other.export())
    with pytest.raises(CheckpointError, match="lora_A.* is 4x192 there and missing here"):
        TorchEngine(packed(["q_proj"])).load(tmp_path / "checkpoint")

    engine.save_pretrained(tmp_path / "model", None)
    assert "quantization" not in (tmp_path / "model" / "config.json").read_text()
    assert engine.module.get_base_model().config.quantization_config.load_in_4bit, "and the learner goes on"
    with torch.no_grad():
        plain = load_policy(tmp_path / "model")
        torch.testing.assert_close(plain(IDS).logits, engine(input_ids=IDS).logits, atol=1e-5, rtol=0)
    step()


def test_the_adapter_of_packed_weights_belongs_to_packed_weights(packed, tmp_path):
    import peft

    base = tmp_path / "base"
    build_scratch("qwen2", vocab_size=20, hidden_size=64, layers=1, heads=2, seed=1).save_pretrained(base)
    packing = quantization("nf4", torch.float32)
    adapted_folders(base, tmp_path, **packing)
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(load_policy(base, **packing), tmp_path / "adapter")
        switch_dropout_off(adapted)  # and no packing anew for evaluation on a CPU, which rounds
        merged = load_policy(tmp_path / "model")
        torch.testing.assert_close(adapted(IDS).logits, merged(IDS).logits, atol=1e-5, rtol=0)


def test_packing_without_its_package(monkeypatch):
    assert quantization("none", torch.float32) == {}
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes; install it with: .*\[qlora\]"):
        quantization("nf4", torch.float32)


def test_a_kernel_that_only_qlora_could_use_is_not_missed_aloud():
    apply_lora(small("qwen2"))
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
