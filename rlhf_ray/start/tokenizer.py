"""The tokenizer that a run starts from: the model's own, another folder's, or one that is learned from the data."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.sections import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.tokenizers import build_tokenizer


def open_tokenizer(model: ModelConfig, texts: Callable[[], list[str]], source: str) -> PreTrainedTokenizerBase:
    """Without any chat template but its own.

    Args:
        texts: what a vocabulary is learned from; not asked where there is one already.
        source: of the texts, for people.
    Raises:
        ModelError: a tokenizer that cannot be loaded. DataError: no text to learn from.
    """
    path, settings = model.tokenizer.path or model.path, model.tokenizer
    if not path.startswith("scratch:"):
        return load_tokenizer(path, trust_remote_code=model.trust_remote_code)
    kind = path.removeprefix("scratch:")
    learned = texts() if settings.alphabet is None else [settings.alphabet]
    if not any(learned):
        raise DataError(f"{source}: no rows with text for a tokenizer; check the file and data.*")
    size = None if kind == "char" else settings.vocab_size
    return build_tokenizer(kind, learned, vocab_size=size, max_length=model.scratch.max_length)
