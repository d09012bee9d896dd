"""From the settings of a supervised run to its trainer: locally, and inside a Ray actor.

Every argument is plain and picklable: paths, the config, the data, a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_ray.config.supervised import ClassifierConfig, DPOConfig, RMConfig, SFTConfig, SupervisedConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.classifiers import freeze_layers, head_names, load_classifier
from rlhf_ray.models.loading import load_policy, load_tokenizer
from rlhf_ray.models.lora import apply_lora, quantization
from rlhf_ray.roles.factory import Assets, Rank, train_engine
from rlhf_ray.roles.kto import KTO, KTOTrainer
from rlhf_ray.roles.objectives import SFT, BradleyTerry, Classification, Objective
from rlhf_ray.roles.preferences import DPO, ReferenceFree
from rlhf_ray.roles.supervised import SupervisedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Splits = Mapping[str, list[Any]]


def make_trainer(config: SupervisedConfig, assets: Assets, splits: Splits, rank: Rank) -> SupervisedTrainer:
    tokenizer = load_tokenizer(assets.tokenizer, trust_remote_code=assets.trust_remote_code)
    labels = labels_of(config, splits)
    # Masters are kept in float32 whatever the compute dtype: load what the folder holds, unrounded.
    model = _network(config, assets, tokenizer, labels)
    make, options = SupervisedTrainer, {}
    if isinstance(config, DPOConfig) and config.dpo.kind == "kto":
        make, options = KTOTrainer, {"max_length": config.data.max_length}
    return make(
        train_engine(config.learner, model, assets.hardware, rank),
        make_objective(config, tokenizer, labels),
        dict(splits),
        tokens_per_microbatch=config.learner.tokens_per_microbatch,
        tokenizer=tokenizer,
        max_skipped_steps=config.learner.max_skipped_steps,
        **options,
    )


def make_objective(
    config: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] = ()
) -> Objective:
    pad = tokenizer.pad_token_id
    if isinstance(config, SFTConfig):
        return SFT.of(tokenizer)
    if isinstance(config, RMConfig):
        return BradleyTerry(pad, config.rm.margin_scale)
    if isinstance(config, DPOConfig) and config.dpo.kind == "kto":
        return KTO(pad, config.dpo)
    if isinstance(config, DPOConfig):
        return DPO(pad, config.dpo) if config.dpo.needs_reference else ReferenceFree(pad, config.dpo)
    if isinstance(config, ClassifierConfig):
        return Classification(pad, labels)
    raise ConfigError(f"{type(config).__name__} is none of the supervised commands' configs")


def labels_of(config: SupervisedConfig, splits: Splits) -> tuple[str, ...]:
    """Names of a classifier's labels; a reward model has one, a language model none.

    Raises DataError for a label without a name.
    """
    if isinstance(config, RMConfig):
        return ("score",)
    if not isinstance(config, ClassifierConfig):
        return ()
    highest = max(item.label for items in splits.values() for item in items)
    names = config.classifier.labels
    if names is None:
        return tuple(f"label_{index}" for index in range(max(highest, 1) + 1))
    if highest >= len(names):
        raise DataError(
            f"{config.data.paths}: a row has the label {highest}, and classifier.labels names {len(names)} "
            f"(0 to {len(names) - 1}); name them all, or leave classifier.labels empty"
        )
    return tuple(names)


def _network(
    config: SupervisedConfig, assets: Assets, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]
) -> nn.Module:
    lora = config.model.lora
    options = {} if lora is None else quantization(lora.quantize, assets.hardware.dtype)
    options["trust_remote_code"] = assets.trust_remote_code
    if labels:
        pad = tokenizer.pad_token_id
        model = load_classifier(assets.policy, labels=labels, pad_token_id=pad, seed=config.seed, **options)
        if isinstance(config, ClassifierConfig):
            freeze_layers(model, config.classifier.frozen_layers)
    else:
        model = load_policy(assets.policy, dtype=torch.float32, **options)
    if lora is None:
        return model
    heads = head_names(model) if labels else ()
    return apply_lora(
        model, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules, trained_modules=heads, seed=config.seed
    )
