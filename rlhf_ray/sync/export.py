"""Streams of (Hugging Face name, tensor): what a learner exports and a generator loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[str, Tensor]
# Called once per sync; every learner rank iterates what it returns to the end, because ZeRO-3 gathers on the
# way.
Source = Callable[[], Iterable[Pair]]


@dataclass(frozen=True)
class ParamMeta:
    """Name, dtype and full shape of one exported tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def describe(pairs: Iterable[Pair]) -> list[ParamMeta]:
    """What a stream holds, without keeping its tensors. Iterates it to the end."""
    return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs]


def tied_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each shared parameter -> its other names, e.g. embeddings -> ("lm_head.weight",)."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group[1:]) for group in names.values() if len(group) > 1}


def with_tied_names(pairs: Iterable[Pair], tied: Mapping[str, Iterable[str]]) -> Iterator[Pair]:
    """The stream with every tied weight also under its other names.

    vLLM packs a tied output head apart from the embeddings on some devices: if only the embeddings are sent,
    the head keeps its old weights and log-probabilities are off by nats without any error.
    """
    written: set[str] = set()
    for name, tensor in pairs:
        # A source that writes some of the names itself must not have them twice.
        for each in (name, *tied.get(name, ())):
            if each not in written:
                written.add(each)
                yield each, tensor


def module_pairs(module: nn.Module) -> Iterator[Pair]:
    """All parameters of a module that is whole on this process, tied ones under every name."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()
