"""A model's weights as the files that `from_pretrained` reads, written while they come: one shard is held at a time."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

# Of one file. Whoever exports holds as much beside the model.
SHARD_BYTES = 4_000_000_000
_WHOLE, _SHARD, _INDEX = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"


def write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """`weights` in one file, or in several of at most SHARD_BYTES (a larger tensor has a file of its own) and an
    index. They are taken from the iterator one by one."""
    parts: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0

    def close() -> None:
        path = folder / f".part-{len(parts)}"
        save_file(_unshared(shard), path, {"format": "pt"})
        parts.append((path, list(shard)))
        shard.clear()

    for name, tensor in weights:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            close()
            size = 0
        shard[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    close()
    if len(parts) == 1:
        parts[0][0].rename(folder / _WHOLE)
        return
    places = {}
    for number, (path, names) in enumerate(parts, start=1):
        final = _SHARD.format(number, len(parts))
        path.rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A second name of the same memory gets a copy: safetensors refuses it otherwise."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def unsaved_names(model: Any) -> set[str]:
    """Names that Transformers leaves out of a folder: of tied weights all but one, and what the model ignores."""
    shared: dict[int, list[str]] = defaultdict(list)
    for name, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        if ".base_layer." not in name:  # one with an adapter leaves as another tensor than the one it is tied to
            shared[id(tensor)].append(name)
    tied = tuple(getattr(model, "_tied_weights_keys", None) or ())
    found = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for names in shared.values():
        declared = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in tied)]
        found |= set(declared[: len(names) - 1])
    return found


def leaves_as_it_is(model: Any) -> bool:
    """Whether the folder's tensors are the module's own: of some models (experts that are computed as one tensor)
    Transformers writes others, made of several."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel):
        return False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return not conversions
