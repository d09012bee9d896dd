"""A receiver that writes down its calls, and a small module with a tied pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


class Recorder:
    """Answers the four calls and remembers them; `fail_at` raises at the n-th bucket."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail_at = fail_at
        self.buckets = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))

    def start_weight_update(self) -> None:
        self.calls.append(("start", None))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.buckets == self.fail_at:
            raise OSError("cable pulled")
        self.buckets += 1
        self.calls.append(("update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(("finish", weight_version))

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.calls]


class Tied(nn.Module):
    """embed [4, 2], body [2, 2] with bias, head tied to embed."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(4, 2)
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make_recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture
def make_tied() -> type[Tied]:
    return Tied
