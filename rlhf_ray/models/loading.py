"""Policies, tokenizers and reward models from a local folder or the Hugging Face Hub."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants as hub
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_ray.config.given import value_of, was_given
from rlhf_ray.config.user_paths import is_folder, typed_path
from rlhf_ray.errors import ModelError
from rlhf_ray.models.tokenizers import ensure_pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def network_kinds() -> Any:
    """Transformers' Auto classes, this package's LSTM among them.

    Not at the top: they load every kind of network, two seconds and 200 MB, also for who reads a tokenizer.json.
    """
    import transformers

    import rlhf_ray.models.lstm  # noqa: F401  registers itself

    return transformers


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model, in evaluation mode (dropout off), of `dtype` on `device`.

    `options` go to `from_pretrained` (`attn_implementation`, `revision`, `quantization_config`, ...).
    Raises ModelError for a folder that is missing, empty, incomplete or no causal LM, and for an unreachable Hub.
    """
    kind = "a causal language model"
    if (given := value_of(path)) is not None:  # a copy: it is the user's, and may be used on
        return copy.deepcopy(given).to(device=device, dtype=dtype).eval()
    model = load_model(network_kinds().AutoModelForCausalLM, path, kind, trust_remote_code, dtype=dtype, **options)
    return model.to(device).eval()


def load_empty_policy(path: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `load_policy` on the meta device: shapes without numbers. Raises ModelError."""
    with torch.device("meta"):
        return network_kinds().AutoModelForCausalLM.from_config(
            load_shape(path, trust_remote_code=trust_remote_code), dtype=dtype, trust_remote_code=trust_remote_code
        )


def load_empty_classifier(path: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The same of `load_reward_model`'s network."""
    with torch.device("meta"):
        return network_kinds().AutoModelForSequenceClassification.from_config(load_shape(path), dtype=dtype)


def load_shape(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model folder or Hub name. Raises ModelError."""
    if (given := value_of(path)) is not None:
        return given.config
    return load_pretrained(network_kinds().AutoConfig, path, "a model's config", trust_remote_code)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; one without a pad token gets its EOS token as pad token."""
    if (given := value_of(path)) is not None:  # a copy: it may get another template, or a token for padding
        return ensure_pad_token(copy.deepcopy(given), str(path))
    folder = local_folder(path)
    if folder is not None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{path}: the folder has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save it there with "
            "tokenizer.save_pretrained(folder), or name another folder as tokenizer"
        )
    factory = PreTrainedTokenizerFast if folder is not None and _is_generic(folder) else network_kinds().AutoTokenizer
    tokenizer = load_pretrained(factory, path, "a tokenizer", trust_remote_code)
    return ensure_pad_token(tokenizer, str(path))


def stop_token_ids(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> tuple[int, ...]:
    """What ends an answer: the tokenizer's EOS, and what the model says ends one of its turns (Gemma's <end_of_turn>).

    The model's own count only if the tokenizer marks them as special: a model made from a config with defaults names
    numbers that are ordinary tokens of a small vocabulary.
    """
    try:
        folder = local_folder(path)
        here = folder is not None or not hub_is_known()
        named = GenerationConfig.from_pretrained(str(folder or path), local_files_only=here).eos_token_id
    except OSError:
        named = load_shape(path, trust_remote_code=trust_remote_code).get_text_config().eos_token_id
    return with_named_ends(named, tokenizer)


def with_named_ends(named: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's EOS, and those of `named`, a generation config's `eos_token_id`, that it marks as special."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    own = named if isinstance(named, Sequence) else [named]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *(token for token in own if token in marked)]))


def _is_generic(folder: Path) -> bool:
    """Whether the folder's tokenizer is all in tokenizer.json.

    AutoTokenizer looks at config.json first: beside a Qwen2 model it takes Qwen2's own rules of splitting and joining
    for any tokenizer, and a word tokenizer loses its blanks. Such a folder says which class saved it: believe it.
    """
    try:
        saved = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = str(saved.get("tokenizer_class", "")).removesuffix("Fast")
    return (folder / "tokenizer.json").is_file() and named in ("TokenizersBackend", "PreTrainedTokenizer")


def load_reward_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Hugging Face sequence classifier, in evaluation mode, and its tokenizer.

    One label: a Bradley-Terry reward model, whose logit is the score. More labels: the last one is the good one.
    Raises ModelError, also for a folder without a trained head (a policy's).
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    kind = "a sequence classifier"
    model = load_model(
        network_kinds().AutoModelForSequenceClassification, path, kind, trust_remote_code, dtype=dtype, **options
    )
    if model.config.pad_token_id is None:
        # A decoder's classifier looks for the last token that is not padding; without this id it refuses batches.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def local_folder(path: str | Path) -> Path | None:
    """The folder that `path` names, or None for a Hub name. Raises ModelError for a missing or empty folder."""
    folder = typed_path(path)
    text = str(path)
    if was_given(path):
        raise ModelError(
            f"{path}: a model or tokenizer that was given from Python is in no folder of this name; give it again from "
            "Python, or the folder of a run's model"
        )
    if is_folder(folder):
        if not any(folder.iterdir()):
            raise ModelError(f"{path}: the folder is empty; was the export cut short? Run it again")
        if not (folder / "config.json").exists() and (folder / "model" / "config.json").exists():
            raise ModelError(f"{path}: the folder of a run, not of a model; name its model: {Path(path) / 'model'}")
        return folder
    # A Hub name is `name` or `owner/name`; anything else can only have meant a folder.
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"{path}: no such folder; give an existing model folder, or a Hub name (owner/name)")
    return None


def load_pretrained(factory: Any, path: str | Path, what: str, trust_remote_code: bool, **options: Any) -> Any:
    """`factory.from_pretrained`, with errors that say what to do. Raises ModelError."""
    folder = local_folder(path)
    if folder is not None and what != "a tokenizer" and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{path}: the folder holds a LoRA adapter alone; name the model into which it is merged (of a run: "
                "model/), or merge it into its base with PEFT"
            )
        raise ModelError(f"{path}: the folder has no config.json, so it holds no Hugging Face model; check the path")
    if folder is None and not hub_is_known():
        options["local_files_only"] = True  # each file that a model may have would be asked for, six times, for 25 s
    try:
        return factory.from_pretrained(str(folder or path), trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, hub and safetensors errors
        advice = (
            "is the folder complete, and of this kind?"
            if folder is not None
            else "no local folder has this name either; check the name and the network, log in for a gated model, "
            f"or give a local folder (the Hub here is {hub.ENDPOINT}; HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 "
            "allows cached models only)"
        )
        if not trust_remote_code and "contains custom code" in str(error):
            advice = "read it, and if it may run here set model.trust_remote_code (generate: --trust-remote-code)"
        raise ModelError(
            f"{path}: cannot load {what} ({type(error).__name__}: {_first_line(error)}); {advice}"
        ) from error


def hub_is_known() -> bool:
    """Whether the Hub's address has a number, without which nothing of it can be loaded. Behind a proxy that knows it
    the machine itself need not."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def load_model(factory: Any, path: str | Path, what: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """`load_pretrained` of a model whose parameters are all in the folder: Transformers draws those that are not at
    random, and only logs it. Raises ModelError."""
    model, report = load_pretrained(factory, path, what, trust_remote_code, output_loading_info=True, **options)
    missing = [name for name, _ in model.named_parameters() if name in report["missing_keys"]]
    if missing:
        raise ModelError(
            f"{path}: its files hold no {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, so it is "
            f"not {what}, or only a part of one; name a complete model of this kind"
        )
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
