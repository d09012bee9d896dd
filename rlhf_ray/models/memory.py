"""How many bytes a model takes on a device, by role: the one place for these formulas.

`--dry-run` prints them for a run's own layout, `rlhf-ray plan` chooses a layout by them. Pure arithmetic; each formula
names its source, `benchmarks/plan_memory.py` compares it with what is really allocated (docs/plan.md).
"""

from __future__ import annotations

import math

import torch

from rlhf_ray.algo.logprobs import CPU_SLICE_ELEMENTS, SLICE_ELEMENTS
from rlhf_ray.config.sections import TrainEngineConfig
from rlhf_ray.models.architecture import Architecture
from rlhf_ray.models.deepspeed_engine import BUCKET_ELEMENTS
from rlhf_ray.models.size import Size

ADAM_BYTES = 8  # two moments a trained parameter, float32
PACKED_BITS = 4.127  # with its share of doubly quantised scales (QLoRA, Dettmers et al. 2023, section 3.2)
LIVE_PARAMETERS = 10**9  # DeepSpeed's default
MASTER_BYTES = 4  # gradients, and the float32 copy of weights that are computed with in bfloat16


def weight_bytes(size: Size, itemsize: int) -> int:
    """Of a learner's model: packed weights of QLoRA in 4 bits."""
    return (size.parameters - size.packed) * itemsize + math.ceil(size.packed * PACKED_BITS / 8)


def train_bytes(size: Size, settings: TrainEngineConfig, dtype: torch.dtype) -> int:
    """Bytes that one rank of a training engine needs, besides activations.

    ZeRO (Rajbhandari et al. 2020, figure 1): stage 1 shards the optimiser state, 2 the gradients too, 3 the weights
    too. What is offloaded lies in host memory and is not counted. The paper's gradients have 2 bytes; ours 4, for they
    are summed in float32.
    """
    return sum(train_parts(size, settings, dtype).values())


def train_parts(size: Size, settings: TrainEngineConfig, dtype: torch.dtype) -> dict[str, int]:
    """`train_bytes` by part: weights, gradients, optimiser."""
    ranks = settings.world_size
    stage = settings.zero_stage if settings.facts.shards else 0
    if settings.facts.shards and dtype == torch.bfloat16:
        stage = max(stage, 1)  # deepspeed_engine.py runs stage 0 so
    gradients, weights = size.trained * MASTER_BYTES, weight_bytes(size, dtype.itemsize)
    # From stage 1 on DeepSpeed keeps masters in float32 runs as well.
    masters = size.trained * MASTER_BYTES if dtype != torch.float32 or stage >= 1 else 0
    optimiser = size.trained * ADAM_BYTES + masters
    if settings.offload != "none":
        optimiser = 0
    if settings.offload == "parameters":
        weights = 0
    return {
        "weights": weights // (ranks if stage == 3 else 1),
        "gradients": gradients // (ranks if stage >= 2 else 1),
        "optimiser": optimiser // (ranks if stage >= 1 else 1),
    }


def offloaded_bytes(size: Size, settings: TrainEngineConfig, dtype: torch.dtype) -> int:
    """Host memory of one rank for what `offload` keeps there: moments, masters and gradients in float32, and weights.

    (DeepSpeed, Memory Requirements: 16 bytes a parameter, 18 with the weights in 2 bytes.)
    """
    if settings.offload == "none":
        return 0
    held = size.trained * (ADAM_BYTES + 2 * MASTER_BYTES)
    if settings.offload == "parameters":
        held += weight_bytes(size, dtype.itemsize)
    return held // settings.world_size


def layer_bytes(shape: Architecture, longest: int, itemsize: int) -> int:
    """What the backward pass of one layer needs of a token, kept from the forward pass.

    Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, equation 1) count the same
    tensors for GPT-3's layer with dropout: s b h (34 + 5 a s / h). Here is no dropout, attention is fused (no scores),
    an RMS norm computes in float32, and the padding mask is kept by each layer in the model's precision.

    Args:
        longest: tokens of a row of the micro-batch, with padding.
    """
    norm = 4 + 2 * itemsize if shape.gated else 2 * itemsize  # RMS: float32 copy, normalised, scaled; layer norm: 2
    norms = 2 * norm * shape.hidden
    if shape.normed_heads:  # what comes out of these goes to the rotation, which does not keep it
        norms += (4 + itemsize) * (shape.queries + shape.keys)
    # Queries, keys, values (both once a query: a mask allows no grouping) and the output; a sum a head in float32.
    attention = 4 * itemsize * shape.queries + 4 * shape.heads + itemsize * longest
    mlp = (4 if shape.gated else 5) * itemsize * shape.mlp
    return norms + attention + mlp


def activation_bytes(
    shape: Architecture, tokens: int, longest: int, itemsize: int, *, checkpointing: bool, logits: bool = True,
    device: str = "cuda",
) -> int:  # fmt: skip
    """Most that a forward and backward pass over a micro-batch of so many tokens holds beside the weights.

    With checkpointing each layer keeps its input only, and one layer at a time is computed again (Chen et al. 2016).

    Args:
        logits: a policy's pass, which holds the logits of all tokens and their gradients; a critic's holds a number.
    """
    layer = layer_bytes(shape, longest, itemsize)
    head = tokens * (4 + 2 * itemsize) * shape.hidden  # the last norm
    if logits:
        head += 2 * tokens * shape.vocab * itemsize + _slices(tokens * shape.vocab, itemsize, device)
    if not checkpointing:
        return tokens * shape.layers * layer + head
    # The head's tensors are gone when the last layer is computed again.
    again = tokens * (layer + _backward(shape, itemsize))
    return tokens * shape.layers * itemsize * shape.hidden + max(head, again)


def _slices(elements: int, itemsize: int, device: str) -> int:
    """What `algo/logprobs.py` holds of logits in float32: one slice, and the next before the first is gone."""
    whole = CPU_SLICE_ELEMENTS if device == "cpu" else SLICE_ELEMENTS
    copies = (2 if elements > whole else 1) * 4 + (itemsize if itemsize < 4 else 0)
    return copies * min(elements, whole)


def _backward(shape: Architecture, itemsize: int) -> int:
    """Gradients of a layer's own tensors that live at the same time, a token: those of the MLP, the widest."""
    return itemsize * (2 * shape.mlp + 2 * shape.hidden)


def forward_bytes(shape: Architecture, tokens: int, itemsize: int, *, logits: bool = True) -> int:
    """Most that a pass without gradients holds beside the weights: the logits, or one layer's widest tensors."""
    layer = itemsize * (2 * shape.hidden + 3 * shape.mlp) + 4 * shape.hidden
    return tokens * max(layer, itemsize * (shape.vocab + shape.hidden) if logits else 0)


def kv_bytes_a_token(shape: Architecture, itemsize: int, tensor_parallel: int = 1) -> int:
    """Keys and values of one token on each of the devices that share a generator.

    2 x layers x heads x size x bytes (Kwon et al. 2023, section 3: 800 KB for OPT-13B). A head is the least that a
    device can hold.
    """
    return 2 * shape.layers * math.ceil(shape.kv_heads / tensor_parallel) * shape.head_size * itemsize


def buffer_bytes(size: Size, settings: TrainEngineConfig, dtype: torch.dtype) -> int:
    """What DeepSpeed holds beside states when a backward pass begins, as it was measured (docs/plan.md).

    Stage 1 keeps the bucket of the micro-batch before, or in bfloat16 the gradients before they are summed. Stage 3
    holds layers that it has made whole, at most `stage3_max_live_parameters` (1e9 where, as here, nobody sets it), and
    buckets in the weights' precision and in half of float32's. In stage 2 buckets come late in the backward pass, when
    activations have made room.
    """
    stage = settings.zero_stage if settings.facts.shards else 2
    bucket = min(BUCKET_ELEMENTS, 2 * size.parameters)
    if stage <= 1 and dtype == torch.bfloat16:
        return size.trained * dtype.itemsize
    if stage == 1:
        return bucket * dtype.itemsize
    if stage == 3:
        return min(size.parameters, LIVE_PARAMETERS) * dtype.itemsize + bucket * (dtype.itemsize + 2)
    return 0
