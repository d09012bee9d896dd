"""The single-process engine: hand-worked steps, bfloat16 masters, bit-equal resume, plain exports."""

from __future__ import annotations

import math
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from rlhf_ray.errors import CheckpointError, ConfigError, ModelError, StepError
from rlhf_ray.models import torch_engine
from rlhf_ray.models.engine import build_engine
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.lora import without_adapter
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.models.trainable import adam_groups, clip_scale

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import EPS, equal, snapshot, tiny, tiny_lora, train


class Scale(nn.Module):
    """y = w x, with w = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 2))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(y=(self.w * x).sum())


def test_gradients_are_summed_then_clipped_by_their_global_norm() -> None:
    engine = TorchEngine(Scale(), max_grad_norm=1.0, eps=0.0, betas=(0.0, 0.0))
    engine.backward(engine(x=torch.tensor([[1.0, 0.0]])).y, last=False)
    engine.backward(engine(x=torch.tensor([[2.0, 4.0]])).y, last=True)
    # Sum over micro-batches (3, 4): norm 5. An average would give 2.5.
    assert engine.step(lr=0.0) == pytest.approx(5.0)
    engine.backward(engine(x=torch.tensor([[3.0, -4.0]])).y, last=True)
    engine.step(lr=0.1)
    # Adam without memory steps by lr against the sign.
    assert engine.module.w.tolist() == [[pytest.approx(0.9), pytest.approx(1.1)]]
    assert engine.steps == 2


def test_adam_sees_the_clipped_gradient() -> None:
    engine = TorchEngine(Scale(), max_grad_norm=1.0, eps=1.0, betas=(0.0, 0.0))
    engine.backward(engine(x=torch.tensor([[3.0, 4.0]])).y, last=True)
    engine.step(lr=1.0)
    # Clipped to (0.6, 0.8); a step is g / (|g| + eps) = 0.375 and 0.4444.
    assert engine.module.w.tolist() == [[pytest.approx(0.625, abs=1e-6), pytest.approx(1 - 0.8 / 1.8, abs=1e-6)]]


def test_clip_scale() -> None:
    assert clip_scale(5.0, 1.0) == pytest.approx(0.2, rel=1e-6)
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(5.0, 0.0) == 1.0
    assert clip_scale(5.0, math.inf) == 1.0


def test_weight_decay_spares_biases_and_norms() -> None:
    model = tiny()
    decayed, spared = adam_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    engine = TorchEngine(tiny(), eps=EPS)
    twin = TorchEngine(tiny(), eps=EPS)
    train(engine, [0])
    train(twin, [0])
    logits = engine(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits
    engine.backward(logits.sum() * bad, last=True)
    assert not math.isfinite(engine.step(1.0))
    assert equal(snapshot(engine), snapshot(twin))
    assert engine.steps == 1
    assert train(engine, [1]) == train(twin, [1])  # nor did the moments move


def test_a_zero_weighted_micro_batch_changes_nothing() -> None:
    engine = TorchEngine(Scale(), max_grad_norm=0.0)
    engine.backward(engine(x=torch.tensor([[3.0, 4.0]])).y, last=False)
    engine.backward(engine(x=torch.tensor([[7.0, 7.0]])).y * 0.0, last=True)
    assert engine.step(0.0) == pytest.approx(5.0)


def test_bfloat16_learns_from_steps_it_cannot_show() -> None:
    model = Scale()
    engine = TorchEngine(model, dtype=torch.bfloat16, max_grad_norm=0.0)
    for _ in range(8):
        engine.backward(engine(x=torch.tensor([[-1.0, -1.0]])).y, last=True)
        engine.step(lr=1e-3)
    # bfloat16 has 1 and 1.0078 and nothing between: 8 steps of 0.001 are 0.008, one alone would round away.
    assert model.w.dtype == torch.bfloat16
    assert model.w.tolist() == [[1.0078125, 1.0078125]]


def test_bfloat16_sums_micro_batches_in_float32() -> None:
    engine = TorchEngine(Scale(), dtype=torch.bfloat16, max_grad_norm=0.0)
    for i in range(9):
        engine.backward(engine(x=torch.tensor([[256.0 if i == 0 else 1.0, 0.0]])).y, last=i == 8)
    # In bfloat16 256 + 1 is 256: the other eight would vanish.
    assert engine.step(0.0) == 264.0


def test_bfloat16_leaves_rotary_frequencies_alone() -> None:
    engine = TorchEngine(tiny(), dtype=torch.bfloat16)
    assert engine.module.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}


def with_dropout_in_attention() -> nn.Module:
    model = tiny()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


def with_dropout_of_the_layers_own() -> nn.Module:
    sizes = {"vocab_size": 48, "hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, dropout=0.5, layerdrop=0.5))


@pytest.mark.parametrize("make", [with_dropout_in_attention, with_dropout_of_the_layers_own])
def test_dropout_is_off_so_that_a_forward_pass_depends_on_weights_and_tokens_only(make) -> None:
    model = make()
    for checkpointing in (False, True):
        engine = TorchEngine(model, gradient_checkpointing=checkpointing)
        ids = torch.arange(12)[None]
        assert torch.equal(engine(input_ids=ids).logits, engine(input_ids=ids).logits)


def test_gradient_checkpointing_recomputes_and_gives_the_same_numbers() -> None:
    plain, checkpointed = (TorchEngine(tiny(), gradient_checkpointing=on, eps=EPS) for on in (False, True))
    calls: list[int] = []
    checkpointed.module.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert train(plain, [0, 1]) == train(checkpointed, [0, 1])
    # Per step one pass without gradient; 3 and 4 micro-batches, each computed twice.
    assert len(calls) == 2 + 2 * (3 + 4)
    assert equal(snapshot(plain), snapshot(checkpointed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    engine = TorchEngine(tiny(), dtype=dtype, weight_decay=0.01)
    train(engine, [0, 1])
    engine.save(tmp_path)
    history = train(engine, [2, 3])
    resumed = TorchEngine(tiny(seed=7), dtype=dtype, weight_decay=0.01)
    resumed.load(tmp_path)
    assert resumed.steps == 2
    assert train(resumed, [2, 3]) == history
    assert equal(snapshot(resumed), snapshot(engine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_behind_the_next_step_is_what_was_there_before_it(tmp_path: Path, dtype, monkeypatch) -> None:
    engine = TorchEngine(tiny(), dtype=dtype)
    train(engine, [0, 1])
    at_once = engine.save(tmp_path / "at once")
    may_write, write = threading.Event(), torch_engine.write_state
    monkeypatch.setattr(torch_engine, "write_state", lambda *args: may_write.wait() and write(*args))
    engine.begin_save(tmp_path / "behind")
    train(engine, [2])
    assert not engine.is_saved() and not (tmp_path / "behind").exists()
    may_write.set()
    assert engine.saved() == at_once and engine.is_saved()  # size and sha256 of every file
    with pytest.raises(StepError, match="nothing is being saved"):
        engine.saved()


def test_a_checkpoint_written_while_the_adapter_is_off_knows_what_is_trained(tmp_path: Path, monkeypatch) -> None:
    engine = TorchEngine(tiny_lora())
    train(engine, [0])
    at_once = engine.save(tmp_path / "at once")
    may_write, write = threading.Event(), torch_engine.write_state
    monkeypatch.setattr(torch_engine, "write_state", lambda *args: may_write.wait() and write(*args))
    engine.begin_save(tmp_path / "behind")
    with without_adapter(engine.module):  # as the next step's pass for the reference: PEFT freezes the matrices
        assert not any(p.requires_grad for p in engine.module.parameters())
        may_write.set()
        assert engine.saved() == at_once
    resumed = TorchEngine(tiny_lora(seed=7))
    resumed.load(tmp_path / "behind")
    assert equal(snapshot(resumed), snapshot(engine))


def test_a_thread_that_cannot_write_says_so_to_whoever_asks(tmp_path: Path) -> None:
    engine = TorchEngine(tiny())
    (tmp_path / "file").touch()
    engine.begin_save(tmp_path / "file")
    with pytest.raises(FileExistsError):
        engine.saved()


def test_load_refuses_what_does_not_fit(tmp_path: Path) -> None:
    engine = TorchEngine(tiny())
    with pytest.raises(CheckpointError, match="does not exist"):
        engine.load(tmp_path)
    engine.save(tmp_path)
    with pytest.raises(CheckpointError, match="written with dtype=torch.float32, this run has dtype=torch.bfloat16"):
        TorchEngine(tiny(), dtype=torch.bfloat16).load(tmp_path)
    wider = build_scratch("qwen2", vocab_size=48, hidden_size=64, layers=2, heads=2)
    for other, said in ((wider, "48x32 there and 48x64 here"), (tiny_lora(), "is missing there")):
        with pytest.raises(CheckpointError, match=f"does not fit this model: .*{said}"):
            TorchEngine(other).load(tmp_path)
    file = tmp_path / "rank_0.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        engine.load(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_export_and_saved_folder_hold_the_trained_weights(tmp_path: Path, tied: bool) -> None:
    engine = TorchEngine(tiny(tied), gradient_checkpointing=True)
    train(engine, [0])
    weights = snapshot(engine)
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]) is tied
    engine.save_pretrained(tmp_path, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert equal(dict(loaded.state_dict()), weights)
    assert loaded.config.use_cache  # off in training only
    assert loaded.config.tie_word_embeddings is tied


def test_lora_trains_adapters_only_and_exports_them_merged(tmp_path: Path) -> None:
    engine = TorchEngine(tiny_lora())
    frozen = {n: p.clone() for n, p in engine.module.named_parameters() if not p.requires_grad}
    train(engine, [0, 1])
    assert all(torch.equal(p, frozen[n]) for n, p in engine.module.named_parameters() if n in frozen)
    weights = snapshot(engine)
    assert weights.keys() == tiny().state_dict().keys()
    engine.save_pretrained(tmp_path, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, engine(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    engine = TorchEngine(tiny())
    with torch.no_grad():
        next(engine.module.parameters())[3, 2] = float("inf")
    with pytest.raises(ModelError, match="weights are not finite .the first is .*embed_tokens.* lower learning"):
        engine.save_pretrained(tmp_path / "model", None)
    assert not (tmp_path / "model").exists()


def test_a_critic_trains_and_its_folder_loads(tmp_path: Path) -> None:
    engine = TorchEngine(ValueModel(tiny().base_model), gradient_checkpointing=True)
    losses = [loss for loss, _ in train(engine, [0] * 5)]
    assert losses[-1] < losses[0]
    engine.save_pretrained(tmp_path, None)
    assert equal(dict(ValueModel.from_pretrained(tmp_path).state_dict()), snapshot(engine))


def test_factory_refusals() -> None:
    with pytest.raises(ConfigError, match="zero_stage"):
        build_engine("torch", tiny(), zero_stage=2)
    with pytest.raises(ConfigError, match="choose one of torch, deepspeed"):
        build_engine("fsdp", tiny())
    with pytest.raises(ModelError, match="float16"):
        build_engine("torch", tiny(), dtype=torch.float16)
    with pytest.raises(ModelError, match="no trainable parameter"):
        build_engine("torch", tiny().requires_grad_(False))
    with pytest.raises(ModelError, match="gradient_checkpointing=false"):
        build_engine("torch", build_scratch("lstm", vocab_size=48), gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="zero_stage=3"):
        build_engine("deepspeed", tiny(), zero_stage=2, offload="parameters")
    with pytest.raises(ConfigError, match="zero_stage=1, 2 or 3"):
        build_engine("deepspeed", tiny(), zero_stage=0, offload="optimizer")
    with pytest.raises(ConfigError, match="mps"):
        build_engine("deepspeed", tiny(), device="mps")


def test_all_reduce_of_one_rank_is_the_value() -> None:
    engine = TorchEngine(Scale())
    value = torch.tensor([1, 2])
    assert engine.all_reduce(value, "max").tolist() == [1, 2]
    assert engine.all_reduce(value) is not value
