"""The seed of every sample: keyed, not sequential."""

from __future__ import annotations

import hashlib


def sample_seed(run_seed: int, position: int, member: int) -> int:
    """63 bits that depend on nothing but these three numbers.

    `position` is the prompt's place in the stream (negative: held-out prompts), `member` the answer's in its group.
    """
    digest = hashlib.blake2b(f"{run_seed}/{position}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
