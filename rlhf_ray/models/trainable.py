"""A network made ready for training, by either engine: dtype, optimiser groups, dropout, gradient checkpointing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_ray.errors import DivergenceError, ModelError

_SKIPPED = "skipped_steps.json"


def check_train_dtype(dtype: torch.dtype) -> None:
    """Raises ModelError for a dtype that no engine trains in."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(
            f"dtype {dtype} cannot be trained here: float16 gradients underflow without loss scaling; "
            "use bfloat16, or float32 where the device has no bfloat16"
        )


def adam_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW parameter groups of the trainable parameters: matrices decay, biases and norm weights do not.

    Raises ModelError if nothing is trainable.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError("the model has no trainable parameter; unfreeze some, or give it a LoRA adapter")
    matrices = [p for p in trainable if p.ndim >= 2]
    vectors = [p for p in trainable if p.ndim < 2]
    if weight_decay == 0.0 or not matrices or not vectors:
        # One group means one flat buffer in ZeRO, hence fewer collectives.
        return [{"params": trainable, "weight_decay": weight_decay if matrices else 0.0}]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def enable_gradient_checkpointing(module: nn.Module) -> None:
    """Recompute activations in the backward pass. Raises ModelError where the model cannot."""
    enable = getattr(module, "gradient_checkpointing_enable", None)
    supported = getattr(module, "supports_gradient_checkpointing", enable is not None)
    if enable is None or not supported:
        raise ModelError(
            f"{type(module).__name__} cannot do gradient checkpointing; set learner.gradient_checkpointing=false"
        )
    # The reentrant kind needs inputs that require grad, which a LoRA model's frozen embeddings do not give.
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in module.modules():
        if getattr(layer, "gradient_checkpointing", False):
            # Layers recompute only while "training"; their children stay as they are, so dropout stays off. Some
            # (OPT, Falcon) keep rates of their own, which would now be in force.
            layer.training = True
            for name, value in list(vars(layer).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)
    if hasattr(module, "config"):
        module.config.use_cache = False


def switch_dropout_off(module: nn.Module) -> None:
    """Evaluation mode, but for the layers that cannot learn in it.

    An importance ratio of exactly 1 on the first step, and equal numbers on any number of ranks, need a
    forward pass that depends on weights and tokens only.
    """
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            # cuDNN refuses the backward pass of a recurrent layer in evaluation mode.
            layer.dropout = 0.0
            layer.training = True
        elif is_packed(layer):
            # bitsandbytes would pack the weights anew for inference on a CPU, and round their scales.
            layer.training = True


def is_packed(layer: nn.Module) -> bool:
    """Whether its weight is bytes that stand for numbers (QLoRA)."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and not weight.is_floating_point()


class SkippedSteps:
    """Ends a training whose gradients stay infinite or NaN; each such step was skipped, so the weights are sound."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def save(self, folder: Path, rank: int) -> None:
        """All ranks have counted the same."""
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _SKIPPED).write_text(json.dumps({"in_a_row": self.in_a_row}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """A restarted run must not count anew, or it would never end. Older checkpoints kept no count."""
        file = folder / _SKIPPED
        self.in_a_row = json.loads(file.read_text(encoding="utf-8"))["in_a_row"] if file.is_file() else 0

    def count(self, grad_norm: float) -> None:
        """Raises DivergenceError on reaching the limit; on every rank, for all of them have the same norm."""
        self.in_a_row = 0 if math.isfinite(grad_norm) else self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise DivergenceError(
                f"the last {self.in_a_row} optimiser steps had no finite gradient and were skipped (max_skipped_steps="
                f"{self.limit}), so nothing is learned any more; lower the learning rate, look for rewards or rows "
                "that no model can follow, and go on with --resume auto"
            )


def clip_scale(norm: float, max_grad_norm: float) -> float:
    """Factor for the gradients; 0 or inf as `max_grad_norm` switches clipping off."""
    if max_grad_norm <= 0.0 or math.isinf(max_grad_norm):
        return 1.0
    return min(1.0, max_grad_norm / (norm + 1e-6))
