"""Memory formulas: worked by hand, against published numbers, and against what torch really allocates."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from rlhf_ray.config.schema import LearnerConfig
from rlhf_ray.errors import ModelError
from rlhf_ray.models.architecture import Architecture
from rlhf_ray.models.memory import (
    activation_bytes,
    buffer_bytes,
    forward_bytes,
    kv_bytes_a_token,
    layer_bytes,
    offloaded_bytes,
    train_bytes,
    train_parts,
)
from rlhf_ray.models.size import Size

TINY = Architecture(layers=2, hidden=8, heads=4, kv_heads=2, head_size=2, mlp=24, vocab=100)
GB = 1e9


def test_a_layer_by_hand():
    # Two RMS norms: 8 numbers in float32, and twice in bfloat16. Queries, keys, values, output: 8 each; 4 sums in
    # float32; a mask of 16 tokens. The MLP's gate, its function, the other half, their product: 24 each.
    assert layer_bytes(TINY, longest=16, itemsize=2) == 2 * (4 + 4) * 8 + 4 * 2 * 8 + 4 * 4 + 2 * 16 + 4 * 2 * 24
    assert layer_bytes(TINY, longest=16, itemsize=4) == 2 * (4 + 8) * 8 + 4 * 4 * 8 + 4 * 4 + 4 * 16 + 4 * 4 * 24


def test_activations_by_hand():
    layer, tokens = layer_bytes(TINY, 16, 2), 32
    head = 32 * 8 * 8 + 2 * 32 * 100 * 2 + 32 * 100 * (4 + 2)  # the last norm, logits and gradients, one slice of them
    assert activation_bytes(TINY, tokens, 16, 2, checkpointing=False) == 32 * 2 * layer + head
    inputs = 32 * 2 * 2 * 8
    again = 32 * (layer + 2 * (2 * 24 + 2 * 8))
    assert activation_bytes(TINY, tokens, 16, 2, checkpointing=True) == inputs + max(head, again)
    without = activation_bytes(TINY, tokens, 16, 2, checkpointing=False, logits=False)
    assert without == 32 * 2 * layer + 32 * 8 * 8, "a critic has no logits"


def test_a_pass_without_gradients_holds_its_logits_or_its_widest_layer():
    assert forward_bytes(TINY, 10, 2) == 10 * 2 * (100 + 8)
    assert forward_bytes(TINY, 10, 2, logits=False) == 10 * (2 * (16 + 72) + 32)


def test_zero_of_the_paper():
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 devices; there gradients have 2 bytes, here 4."""
    size = Size(7_500_000_000, 7_500_000_000)
    for stage, published in ((1, 31.4), (2, 16.6), (3, 1.9)):
        settings = LearnerConfig(engine="deepspeed", world_size=64, zero_stage=stage)
        parts = train_parts(size, settings, torch.bfloat16)
        assert parts["weights"] + parts["gradients"] / 2 + parts["optimiser"] == pytest.approx(published * GB, rel=0.02)


def test_zero_of_deepspeeds_estimator():
    """DeepSpeed, Memory Requirements: 2,851M parameters on 8 devices; there in GiB, and ZeRO-2's weights in float32."""
    size = Size(2_851_000_000, 2_851_000_000)
    three = LearnerConfig(engine="deepspeed", world_size=8, zero_stage=3)
    assert train_bytes(size, three, torch.bfloat16) / 2**30 == pytest.approx(6.10, rel=0.03)
    two = LearnerConfig(engine="deepspeed", world_size=8, zero_stage=2, offload="optimizer")
    assert train_parts(size, two, torch.bfloat16)["weights"] / 2**30 == pytest.approx(5.31, rel=0.01)
    # 16 bytes a parameter, over the ranks; the page has a factor of 1.5 for buffers.
    assert 8 * offloaded_bytes(size, two, torch.bfloat16) * 1.5 / 2**30 == pytest.approx(63.74, rel=0.01)


def test_megatrons_layer_without_what_is_not_here():
    """Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h). Without dropout's masks (1 + 1 + 1), the scores
    (5 a s / h) and the copy of the input of each linear layer that a norm's output is anyway."""
    gpt = Architecture(1, 12288, 96, 96, 128, 4 * 12288, 50257, gated=False)
    paper = 12288 * 34
    ours = layer_bytes(gpt, longest=0, itemsize=2) - 4 * 96
    # Ours keeps 5 tensors of the MLP's width where a fused GELU keeps 2: 3 x 4 h x 2 bytes more.
    assert ours - 3 * 4 * 12288 * 2 == pytest.approx(paper, rel=0.06)


def test_keys_and_values_of_papers_and_logs():
    opt = Architecture(40, 5120, 40, 40, 128, 20480, 50272, gated=False)
    assert kv_bytes_a_token(opt, 2) == 800 * 1024, "Kwon et al. 2023, section 3: 800 KB a token for OPT-13B"
    # vLLM's issue 12330: Llama-3-8B on an A100-40: 11.12 GiB were 5,691 blocks of 16 tokens.
    llama = Architecture(32, 4096, 32, 8, 128, 14336, 128256)
    assert 5691 * 16 * kv_bytes_a_token(llama, 2) / 2**30 == pytest.approx(11.12, abs=0.01)
    assert kv_bytes_a_token(llama, 2, tensor_parallel=16) == kv_bytes_a_token(llama, 2, 8), "a head is not divided"


def test_shapes_are_read_from_a_config():
    llama = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        intermediate_size=96, vocab_size=50)  # fmt: skip
    assert Architecture.of(llama, "x") == Architecture(2, 64, 4, 2, 16, 96, 50)
    gpt = Architecture.of(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=50), "x")
    assert gpt == Architecture(2, 64, 4, 4, 16, 256, 50, gated=False)
    assert Architecture.of(Qwen3Config(), "x").normed_heads
    with pytest.raises(ModelError, match="8 experts a layer; plan with a dense model"):
        Architecture.of(MixtralConfig(num_local_experts=8), "x")


def test_what_deepspeed_holds_beside_states():
    size = Size(1000, 1000)

    def of(stage: int, dtype: torch.dtype) -> int:
        return buffer_bytes(size, LearnerConfig(engine="deepspeed", zero_stage=stage, world_size=2), dtype)

    assert buffer_bytes(size, LearnerConfig(), torch.bfloat16) == 0, "torch"
    assert [of(stage, torch.float32) for stage in range(4)] == [0, 2000 * 4, 0, 4 * 1000 + 2000 * 6]
    assert [of(stage, torch.bfloat16) for stage in range(4)] == [2000, 2000, 0, 2 * 1000 + 2000 * 4]


# ---- against what is really allocated -------------------------------------------------------------------------

SMALL = {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 192, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"
    spec = importlib.util.spec_from_file_location("plan_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch float32", "torch bfloat16", "torch float32 checkpointing",
                                  "torch bfloat16 checkpointing"])  # fmt: skip
def test_what_torch_allocates(benchmark, name):
    case = benchmark.CASES[name]
    really = benchmark.measured(case, SMALL, rows=4, length=64)
    assert benchmark.planned(case, SMALL, rows=4, length=64) == pytest.approx(really, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_keeps(kind, dtype):
    """Bytes of all tensors that the backward pass was given, of a third layer more."""
    from transformers import AutoConfig, AutoModelForCausalLM

    B, T = 2, 16
    ids = torch.arange(B * T).view(B, T) % 50
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, 9:] = 0  # padding: attention gets a mask

    def kept(layers: int) -> tuple[int, Architecture]:
        shape = {"n_embd": 32, "n_layer": layers, "n_head": 4} if kind == "gpt2" else {
            "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 80, "head_dim": 8,
        }  # fmt: skip
        config = AutoConfig.for_model(kind, vocab_size=50, bos_token_id=0, eos_token_id=1, **shape)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        found, alive = {}, []

        def pack(tensor):
            alive.append(tensor)  # or its place would be given to the next
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        return sum(count for place, count in found.items() if place not in own), Architecture.of(config, kind)

    (three, shape), (two, _) = kept(3), kept(2)
    assert layer_bytes(shape, T, dtype.itemsize) * B * T == pytest.approx(three - two, rel=0.03)
