"""How many parameters a model has, without loading it: shapes on the meta device, no memory and no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import rlhf_ray.models.lstm  # noqa: F401  registers the LSTM with AutoConfig
from rlhf_ray.config.sections import LoraConfig

Kind = Literal["policy", "classifier"]


@dataclass(frozen=True)
class Size:
    """Parameters of a model, how many of them are trained, and how many its learner holds in 4 bits."""

    parameters: int
    trained: int
    packed: int = 0

    @property
    def base(self) -> int:
        """Without the adapters."""
        return self.parameters - self.trained if self.trained < self.parameters else self.parameters


def saved_size(path: str, kind: Kind = "policy", lora: LoraConfig | None = None) -> Size | None:
    """Size of a model in a folder or in the local Hub cache; None where there is none."""
    factory = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    try:
        shape = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return size_of(factory.from_config(shape), lora)
    except (OSError, ValueError, KeyError):
        return None


def size_of(model: PreTrainedModel, lora: LoraConfig | None = None) -> Size:
    parameters = sum(p.numel() for p in model.parameters())  # a tied weight comes once
    if lora is None:
        return Size(parameters, parameters)
    adapters = sum(lora.r * sum(layer.weight.shape) for layer in _adapted(model, lora))
    packed = 0
    if lora.quantize != "none":
        packed = sum(layer.weight.numel() for layer in _linear(model).values())
    return Size(parameters + adapters, adapters, packed)


def _adapted(model: PreTrainedModel, lora: LoraConfig) -> list[nn.Module]:
    linear = _linear(model)
    if lora.target_modules == "all-linear":
        return list(linear.values())
    wanted = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    return [module for name, module in linear.items() if name.rpartition(".")[2] in wanted]


def _linear(model: PreTrainedModel) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
