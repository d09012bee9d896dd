"""Sequence classifiers that are about to be trained: from any model folder, with a new head where it has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_pretrained


def load_classifier(
    path: str | Path,
    *,
    labels: Sequence[str],
    pad_token_id: int,
    seed: int,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A float32 classifier on the CPU. From a causal language model's folder it takes the backbone and gets a new
    head, which depends on `seed` alone. One label makes a reward model. `options` go to `from_pretrained`.

    Raises ModelError for a folder that is missing or holds no such model.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    with torch.random.fork_rng(devices=[]), _no_load_report():
        torch.default_generator.manual_seed(seed)
        model = load_pretrained(
            AutoModelForSequenceClassification, path, "a sequence classifier", trust_remote_code,
            dtype=torch.float32, num_labels=len(labels), ignore_mismatched_sizes=True, **names, **options,
        )  # fmt: skip
    # A decoder's classifier reads the last token that is not this one: it must be what the rows are padded with.
    model.config.pad_token_id = pad_token_id
    model.config.use_cache = False
    return model.eval()


def freeze_layers(model: PreTrainedModel, count: int) -> list[str]:
    """Switch learning off in the embeddings and the first `count` layers; the names of what is frozen.

    Raises ConfigError where the model has no list of layers, or fewer than that.
    """
    if not count:
        return []
    layers = _layers_of(model)
    if count > len(layers):
        raise ConfigError(
            f"classifier.frozen_layers={count}: {type(model).__name__} has {len(layers)} layers; lower it"
        )
    last_inside = list(layers[count - 1].parameters())[-1]
    frozen = []
    # Parameters come in the order of the model's definition: embeddings, layers, and what stands after them.
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        frozen.append(parameter_name)
        if parameter is last_inside:
            break
    return frozen


def head_names(model: PreTrainedModel) -> list[str]:
    """Top-level modules that are no part of the backbone."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _layers_of(model: PreTrainedModel) -> nn.ModuleList:
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ConfigError(
        f"classifier.frozen_layers: {type(model).__name__} has no list of {wanted} layers; set it to 0"
    )


@contextmanager
def _no_load_report() -> Iterator[None]:
    """A new head, and a language-model head that is left out, are what was asked for: no table about them."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
