"""LoRA and QLoRA adapters with PEFT, and their merged export."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config.user_paths import is_folder, typed_path
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.trainable import is_packed

_BASE = ".base_layer."
GatherParameters = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]


def apply_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    trained_modules: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Freeze `model` and add trainable low-rank matrices: W + (alpha / r) B A (Hu et al., 2021, eq. 3).

    "all-linear" is every linear layer but the language-model head. `trained_modules` (a classifier's new head) get no
    adapter and learn in full. B starts at 0, so the model computes what it
    did before. The result is a PeftModel around `model`. A depends on `seed`; the global random state does not
    change. Raises ConfigError where PEFT is missing or no layer fits.
    """
    # bitsandbytes, which PEFT imports where it is there, warns of a kernel that only QLoRA on some CPUs could use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
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
        # Not SEQ_CLS for a classifier: PEFT would wrap its head in a copy, whose names no folder knows.
        task_type=None if trained_modules else "CAUSAL_LM",
        exclude_modules=list(trained_modules) or None,
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
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(
                f"model.lora.target_modules={target_modules!r} does not fit {type(model).__name__}: {error}"
            ) from error
    if is_folder(folder := typed_path(model.name_or_path)):
        # The adapter's folder says what it belongs to, to whoever loads it, from wherever.
        adapted.peft_config["default"].base_model_name_or_path = str(folder.resolve())
    for name in trained_modules:
        model.get_submodule(name).requires_grad_(True)
    return adapted


def without_adapter(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, a model that `apply_lora` made computes what it did before: the weights that it began with."""
    return model.disable_adapter()


def quantization(quantize: str, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` that hold the frozen weights in 4 bits; none for `none`.

    NormalFloat with doubly quantised scales (QLoRA, Dettmers et al. 2023, sections 3.1 and 3.2); `dtype` is what they
    are computed with. The output head stays as it is. Raises ConfigError where bitsandbytes is missing.
    """
    if quantize == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.lora.quantize={quantize} needs the package bitsandbytes; install it with: pip install "
            "'rlhf-ray[qlora]', or set model.lora.quantize=none"
        )
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": packing}


def merged_state(model: nn.Module, gather: GatherParameters | None = None) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) with every adapter added to its weight; tied weights under each name.

    Weights that are held in 4 bits leave as the numbers that they stand for, which is what the model computes with.
    The live weights are read, never written: one layer's W + (alpha / r) B A exists at a time. `gather` is a
    context manager that makes sharded parameters whole (ZeRO-3); each rank must then iterate to the end.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    gather = gather or (lambda tensors: nullcontext())
    layers = _adapted_layers(base) if base is not model else {}
    packed = {f"{name}.weight": module for name, module in base.named_modules() if is_packed(module)}
    # keep_vars: ZeRO-3 gathers parameters, not the empty tensors it leaves in a plain state_dict.
    for name, tensor in base.state_dict(keep_vars=True).items():
        if ".lora_" in name or (".weight." in name and name.partition(".weight.")[0] + ".weight" in packed):
            continue  # an adapter, or the scales of packed numbers
        layer = layers.get(name.removesuffix(_BASE + "weight")) if name.endswith(_BASE + "weight") else None
        parts = [tensor] if layer is None else [tensor, *_adapter_parameters(layer)]
        with gather(parts):
            with torch.no_grad():  # not around the yield: it would hold for whoever reads the stream, too
                weight = _unpacked(packed[name]) if name in packed else tensor.detach()
                weight = weight if layer is None else _merged(weight, layer)
                if name in packed and getattr(packed[name], "source_cls", None) is Conv1D:
                    weight = weight.T.contiguous()  # GPT-2's [in, out] was turned before it was packed
            yield name.replace(_BASE, "."), weight


def adapter_state(model: nn.Module, gather: GatherParameters | None = None) -> Iterator[tuple[str, Tensor]]:
    """(PEFT's name, tensor) of the adapters alone; `gather` as for `merged_state`."""
    gather = gather or (lambda tensors: nullcontext())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with gather([parameter]):
                yield name, parameter.detach()


def _unpacked(module: nn.Module) -> Tensor:
    """[out, in] the numbers that a packed layer's bytes stand for."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module).detach()


def _merged(weight: Tensor, layer: Any) -> Tensor:
    merged = weight
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
