"""The critic's network: the backbone of a causal language model with one number a token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

import rlhf_ray.models.lstm  # noqa: F401  registers the LSTM backbone with AutoModel
from rlhf_ray.config.user_paths import typed_path
from rlhf_ray.errors import ModelError
from rlhf_ray.models.loading import load_model

HEAD_FILE = "value_head.safetensors"


class ValueOutput(NamedTuple):
    """`values` [B, T] float32: index t has read the tokens up to and including t."""

    values: Tensor


class ValueModel(nn.Module):
    """Backbone and a linear head, as plain parameters, so that every engine can shard it.

    The head starts at zero: an untrained critic says 0 everywhere instead of adding noise to the advantages.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(_width(backbone.config), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.value_head.to(device=backbone.device, dtype=backbone.dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> ValueModel:
        """A folder that `save_pretrained` wrote, or any policy folder or Hub name (then with a new head).

        Raises ModelError.
        """
        kind = "a backbone for the critic (critic.path)"
        model = cls(load_model(AutoModel, folder, kind, trust_remote_code, dtype=dtype, **options))
        head = typed_path(folder) / HEAD_FILE
        if head.is_file():
            model.value_head.load_state_dict(load_file(head))
        return model.eval()

    @property
    def config(self) -> PreTrainedConfig:
        return self.backbone.config

    @property
    def supports_gradient_checkpointing(self) -> bool:
        return self.backbone.supports_gradient_checkpointing

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.backbone.gradient_checkpointing_enable(**kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> ValueOutput:
        inputs["use_cache"] = False
        features_BTH = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        # The head may have been sharded or rounded to another dtype than the backbone's output.
        return ValueOutput(self.value_head(features_BTH.to(self.value_head.weight.dtype))[..., 0].float())

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """A Hugging Face folder of the backbone (`AutoModel` reads it) with the head in a file beside it."""
        state = dict(self.state_dict() if state_dict is None else state_dict)
        head = {k.removeprefix("value_head."): v.contiguous() for k, v in state.items() if k.startswith("value_head.")}
        body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        if len(head) != 2 or len(head) + len(body) != len(state):
            raise ModelError(
                f"{folder}: these {len(state)} tensors are not a critic's (backbone.* and value_head.*); "
                "pass the state of this ValueModel"
            )
        self.backbone.save_pretrained(folder, state_dict=body)
        save_file(head, Path(folder) / HEAD_FILE)


def _width(config: PreTrainedConfig) -> int:
    width = getattr(config.get_text_config(), "hidden_size", None)
    if width is None:
        raise ModelError(
            f"{config.model_type}: its config has no hidden_size, so no value head fits; use another model"
        )
    return width
