"""One sequence as a policy wrote it: ragged and frozen, the unit between prompts and gradients.

Nothing here is padded. A learner makes a `Batch` (roles/batch.py) of the samples it learns from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

Ended = Literal["stop", "length"]  # at a stop token; at the limit of tokens

GIVEN = -1  # the weight version of tokens that no weights of this run wrote


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens, which of them the policy wrote, and what is known of each of those.

    `spans` are half-open intervals of `tokens`, in order and apart from each other: what the policy wrote. Tokens
    outside of them are the prompt, and later what an environment said. W is the number of tokens inside.
    """

    prompt_id: int  # position in the run's prompt stream; equal ids form a group
    sample_id: int  # unique in a run
    tokens: np.ndarray  # [T] int32
    spans: tuple[tuple[int, int], ...]
    logprobs: np.ndarray  # [W] float32, what the generator says it sampled with; 0 in given answers
    versions: np.ndarray  # [W] int32, the weights that wrote each; GIVEN in given answers
    ended: Ended
    media: Any = None  # images and the like, opaque: only a model's processor reads it

    def __post_init__(self) -> None:
        if not len(self.logprobs) == len(self.versions) == self.written:
            raise ValueError(
                f"sample {self.sample_id} has {self.written} written tokens, {len(self.logprobs)} log-probabilities "
                f"and {len(self.versions)} weight versions"
            )

    @property
    def written(self) -> int:
        """How many tokens the policy wrote."""
        return sum(end - start for start, end in self.spans)

    @property
    def truncated(self) -> bool:
        return self.ended == "length"

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def answer(
        prompt_id: int, sample_id: int, prompt: Sequence[int], completion: Sequence[int], logprobs: Sequence[float],
        versions: Sequence[int] | int, ended: Ended,
    ) -> Sample:  # fmt: skip
        """A single answer to a prompt. `versions`: one for each token of it, or one for all."""
        start, end = len(prompt), len(prompt) + len(completion)
        tokens = np.empty(end, np.int32)
        tokens[:start], tokens[start:] = prompt, completion
        if isinstance(versions, int):
            versions_W = np.full(end - start, versions, np.int32)
        else:
            versions_W = np.asarray(versions, np.int32)
        return Sample(
            prompt_id, sample_id, tokens, ((start, end),), np.asarray(logprobs, np.float32), versions_W, ended
        )


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
