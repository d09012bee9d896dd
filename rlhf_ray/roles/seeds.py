"""The seed of every sample: keyed, not sequential."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import overload

import numpy as np


def sample_seed(run_seed: int, position: int, member: int) -> int:
    """63 bits that depend on nothing but these three numbers.

    `position` is the prompt's place in the stream (negative: held-out prompts), `member` the answer's in its group.
    """
    digest = hashlib.blake2b(f"{run_seed}/{position}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, eq=False)
class SampleSeeds:
    """The seeds of N samples. Each is computed when somebody asks for it: where it is drawn with, on many machines."""

    run_seed: int
    positions: np.ndarray  # [N]
    members: np.ndarray  # [N]

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: np.ndarray) -> SampleSeeds: ...
    def __getitem__(self, place: int | np.ndarray) -> int | SampleSeeds:
        if isinstance(place, np.ndarray):
            return SampleSeeds(self.run_seed, self.positions[place], self.members[place])
        return sample_seed(self.run_seed, int(self.positions[place]), int(self.members[place]))
