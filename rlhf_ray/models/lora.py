"""LoRA adapters with PEFT, and their merged export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ray.errors import ConfigError, ModelError

_BASE = ".base_layer."
Gather = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]


def apply_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> nn.Module:
    """Freeze `model` and add trainable low-rank matrices: W + (alpha / r) B A (Hu et al., 2021, eq. 3).

    "all-linear" is every linear layer but the language-model head. B starts at 0, so the model computes what it
    did before. The result is a PeftModel around `model`. A depends on `seed`; the global random state does not
    change. Raises ConfigError where PEFT is missing or no layer fits.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("model.lora needs the package peft; install it with: pip install 'rlhf-ray[peft]'") from error
    if target_modules == "all-linear" and not _linear_layers(model):
        raise ConfigError(
            f"model.lora: {type(model).__name__} has no linear layer besides its head for LoRA to adapt; "
            "train it in full (remove model.lora)"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        # GPT-2 stores its weights as [in, out]; peft would find out too, but with a warning per layer.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(
                f"model.lora.target_modules={target_modules!r} does not fit {type(model).__name__}: {error}"
            ) from error


def merged_state(model: nn.Module, gather: Gather | None = None) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) with every adapter added to its weight; tied weights under each name.

    The live weights are read, never written: one layer's W + (alpha / r) B A exists at a time. `gather` is a
    context manager that makes sharded parameters whole (ZeRO-3); each rank must then iterate to the end.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    gather = gather or (lambda tensors: nullcontext())
    layers = _adapted_layers(base) if base is not model else {}
    # keep_vars: ZeRO-3 gathers parameters, not the empty tensors it leaves in a plain state_dict.
    for name, tensor in base.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        layer = layers.get(name.removesuffix(_BASE + "weight")) if name.endswith(_BASE + "weight") else None
        parts = [tensor] if layer is None else [tensor, *_adapter_parameters(layer)]
        with gather(parts), torch.no_grad():
            yield name.replace(_BASE, "."), tensor.detach() if layer is None else _merged(tensor, layer)


def _merged(weight: Tensor, layer: Any) -> Tensor:
    merged = weight.detach()
    for adapter in layer.active_adapters:
        # get_delta_weight knows the scaling and transposes for GPT-2's [in, out] weights. The sum is made in
        # float32: in bfloat16 a small adapter would round away.
        merged = merged.float() + layer.get_delta_weight(adapter).float()
    return merged.to(weight.dtype)


def _adapted_layers(base: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    layers = {}
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module.merged or any(module.use_dora.values()):
            raise ModelError(
                f"{name}: {'already merged adapters' if module.merged else 'DoRA'} cannot be exported; "
                "give the learner a plain, unmerged LoRA model"
            )
        layers[name] = module
    return layers


def _adapter_parameters(layer: Any) -> list[Tensor]:
    return [parameter for name, parameter in layer.named_parameters() if name.startswith("lora_")]


def _linear_layers(model: PreTrainedModel) -> list[nn.Module]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
