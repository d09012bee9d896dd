"""What a learner or a critic may ask of whatever trains its network.

`TorchEngine` trains in one process, `DeepSpeedEngine` on N ranks with ZeRO 0-3. Both give the same numbers:
gradients are SUMS over micro-batches and ranks, clipped by their global norm, then one AdamW step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

EngineKind = Literal["torch", "deepspeed"]
Gather = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]


class TrainEngine(Protocol):
    """One optimiser step is: forward and `backward` a number of micro-batches, then `step` once.

    The number of micro-batches may differ from step to step, but not between ranks: every micro-batch is a
    collective. A rank that has run out of rows passes a dummy one whose loss is multiplied by 0.
    """

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    steps: int  # optimiser steps applied so far; a skipped step does not count

    def __call__(self, **inputs: Any) -> ModelOutput:
        """Forward pass. Collective."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, this rank's share of a loss SUMMED over micro-batches and ranks.

        The caller has divided by the global normaliser; the engine undoes any averaging of its own.
        `last` marks the final micro-batch of the optimiser step. Collective.
        """

    def step(self, lr: float) -> float:
        """Clip, update, zero the gradients; returns the global gradient norm before clipping.

        A norm that is not finite comes back as inf or nan: the update was then skipped on every rank, and
        weights, moments and `steps` are what they were before. Collective.
        """

    def all_reduce(self, value: Tensor, op: str = "sum") -> Tensor:
        """`value` summed ("sum") or maximised ("max") over ranks, as a new tensor. Collective."""

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor): LoRA merged, tied weights under both names. Collective.

        Tensors may share memory with the model: copy what must survive the next `step`. Every rank must
        iterate to the end, because ZeRO-3 gathers on the way.
        """

    def save(self, folder: Path) -> None:
        """Write all that bit-equal continuation needs: weights, fp32 masters, moments, step. Collective."""

    def load(self, folder: Path) -> None:
        """Undo `save`. Raises CheckpointError if `folder` is incomplete or of another shape. Collective."""

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write a plain Hugging Face folder, LoRA merged. Collective; rank 0 writes."""

    def close(self) -> None:
        """Free what must be freed by hand (process groups)."""


def build_engine(kind: EngineKind, module: nn.Module, **settings: Any) -> TrainEngine:
    """The one place that chooses an engine; `settings` are the keywords of `TorchEngine` or `DeepSpeedEngine`.

    Raises ConfigError for an unknown engine, and for settings that it does not have.
    """
    if kind == "torch":
        from rlhf_ray.models.torch_engine import TorchEngine

        unknown = sorted(settings.keys() - signature(TorchEngine).parameters.keys())
        if unknown:
            raise ConfigError(
                f"learner.engine=torch does not know {unknown}: it trains in one process "
                "without ZeRO; set learner.engine=deepspeed or drop these settings"
            )
        return TorchEngine(module, **settings)
    if kind == "deepspeed":
        from rlhf_ray.models.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(module, **settings)
    raise ConfigError(f"learner.engine={kind!r} is unknown; choose 'torch' or 'deepspeed'")


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
            # Layers recompute only while "training"; their children stay as they are, so dropout stays off.
            layer.training = True
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


def clip_scale(norm: float, max_grad_norm: float) -> float:
    """Factor for the gradients; 0 or inf as `max_grad_norm` switches clipping off."""
    if max_grad_norm <= 0.0 or math.isinf(max_grad_norm):
        return 1.0
    return min(1.0, max_grad_norm / (norm + 1e-6))


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is a PEFT model (asked without importing peft)."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def plain_model(module: nn.Module) -> nn.Module:
    """The Hugging Face model inside a LoRA model, or `module` itself."""
    return module.get_base_model() if is_lora(module) else module


def plain_state(module: nn.Module, gather: Gather | None = None) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) with LoRA merged; nothing copied.

    `gather` is a context manager that makes sharded parameters whole while a pair is out.
    """
    gather = gather or (lambda tensors: nullcontext())
    if is_lora(module):
        from rlhf_ray.models.lora import merged_state

        yield from merged_state(module, gather)
        return
    # state_dict, unlike named_parameters, lists a tied weight under each of its names.
    for name, tensor in module.state_dict(keep_vars=True).items():
        with gather([tensor]):
            yield name, tensor.detach()


def write_pretrained(
    module: nn.Module,
    state: Iterable[tuple[str, Tensor]],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write `state` with the config of `module` as a folder that `from_pretrained` reads.

    Raises ModelError for weights that are not finite: such a folder loads without a word, and answers nonsense.
    """
    weights = {name: tensor.detach().to("cpu") for name, tensor in state}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ModelError(
            f"{len(broken)} of {len(weights)} weights are not finite (the first is {broken[0]}), so no model was "
            f"written to {folder}: the training has diverged; go on from an earlier checkpoint (write its name, like "
            "step_100, into checkpoints/latest) with a lower learning rate"
        )
    model = plain_model(module)
    folder.mkdir(parents=True, exist_ok=True)
    with _no_progress_bar(), _described_as_exported(model):
        model.save_pretrained(folder, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def _described_as_exported(model: Any) -> Iterator[None]:
    """The model's config as it is without what only training needs."""
    kept, quantizer = copy.deepcopy(model.config), getattr(model, "hf_quantizer", None)
    try:
        if getattr(model.config, "use_cache", None) is False:
            # Off only because of gradient checkpointing; whoever generates with this folder wants the cache.
            model.config.use_cache = True
        if quantizer is not None:  # what leaves is not packed
            del model.config.quantization_config
            model.hf_quantizer = None
        yield
    finally:
        model.config.__dict__.update(kept.__dict__)
        if quantizer is not None:
            model.hf_quantizer = quantizer


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Saving is short; a bar of its own would tear the run's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
