"""What a learner or a critic may ask of whatever trains its network.

`TorchEngine` trains in one process, `DeepSpeedEngine` on N ranks with ZeRO 0-3. Both give the same numbers:
gradients are SUMS over micro-batches and ranks, clipped by their global norm, then one AdamW step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_ray.config.engines import TRAINERS, trainer_facts
from rlhf_ray.config.names import is_own
from rlhf_ray.config.user_code import find
from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

    from rlhf_ray.models.pretrained import Export
    from rlhf_ray.models.written import Written


class TrainEngine(Protocol):
    """One optimiser step is: forward and `backward` a number of micro-batches, then `step` once.

    The number of micro-batches may differ from step to step, but not between ranks: every micro-batch is a
    collective. A rank that has run out of rows passes a dummy one whose loss is multiplied by 0.
    """

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    steps: int  # optimiser steps applied so far; a skipped step does not count

    def __call__(self, **inputs: Any) -> ModelOutput:
        """Forward pass. Collective."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, this rank's share of a loss SUMMED over micro-batches and ranks.

        The caller has divided by the global normaliser, or will say it to `step`; the engine undoes any averaging of
        its own.
        `last` marks the final micro-batch of the optimiser step. Collective.
        """

    def step(self, lr: float, scale: float = 1.0) -> float:
        """Clip, update, zero the gradients; returns the global gradient norm before clipping.

        The gradients are multiplied by `scale` first, for a normaliser that was not known when they were computed.
        A norm that is not finite comes back as inf or nan: the update was then skipped on every rank, and
        weights, moments and `steps` are what they were before. Collective.
        """

    def discard(self) -> None:
        """Zero the gradients, for a step that was cut off; or refuse each later `backward`. Not collective."""

    def all_reduce(self, value: Tensor, op: str = "sum") -> Tensor:
        """`value` summed ("sum") or maximised ("max") over ranks, as a new tensor. Collective."""

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor): LoRA merged, tied weights under both names. Collective.

        Tensors may share memory with the model: copy what must survive the next `step`. Every rank must
        iterate to the end, because ZeRO-3 gathers on the way.
        """

    def save(self, folder: Path) -> Written | None:
        """Write all that bit-equal continuation needs: weights, fp32 masters, moments, step. Collective.

        Returns what all ranks have written; of an engine in one process None means what lies in `folder`. An engine
        that can go on while a copy is written has `begin_save`, `is_saved` and `saved` besides: roles/checkpointed.py.
        """

    def load(self, folder: Path) -> None:
        """Undo `save`. Raises CheckpointError if `folder` is incomplete or of another shape. Collective."""

    def save_pretrained(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase | None, what: Export = "model", ends: Sequence[int] = ()
    ) -> None:
        """Write a plain Hugging Face folder, LoRA merged, or one of the adapter alone. Collective; rank 0 writes.

        `ends`: tokens that the model has learned to end an answer with.
        """

    def close(self) -> None:
        """Free what must be freed by hand (process groups)."""


def build_engine(kind: str, module: nn.Module, **settings: Any) -> TrainEngine:
    """The one place that makes an engine, by a name of config/engines.py or by `module:function`.

    `settings` are the keywords of its maker. Raises ConfigError for an unknown engine, and for settings that it does
    not have.
    """
    facts = trainer_facts(kind)
    if not is_own(facts.maker):
        raise ConfigError(f"learner.engine={kind!r} is unknown; choose one of {', '.join(TRAINERS)}")
    make = find(facts.maker, "engine")
    parameters = signature(make).parameters
    unknown = sorted(settings.keys() - parameters.keys())
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        why = "" if facts.shards else ": it trains in one process without ZeRO"
        raise ConfigError(
            f"learner.engine={kind} does not know {unknown}{why}; set learner.engine=deepspeed or drop these settings"
        )
    return make(module, **settings)
