"""Texts that say nearly the same: MinHash signatures find them (Broder 1997), their word triples decide.

How alike two texts are is Jaccard's index of their word triples: those that both have, over those that either has.
Words are those of words.py, in any script, folded (case, width), with the signs of arithmetic between them, for `a + b`
and `a - b` are two texts. A text of fewer than three words is one piece.

An index by locality-sensitive hashing of 128 MinHash values (datasketch) names candidates; each is compared exactly.
So nothing is taken for a duplicate that is none. Of pairs that lie right at the threshold 2 % are missed, of others
fewer; the same ones every time.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import regex

from rlhf_ray.data.words import WORD, fold
from rlhf_ray.errors import ConfigError

Key = TypeVar("Key", bound=Hashable)

WORDS_A_PIECE = 3
_PERMUTATIONS, _SEED = 128, 1
_PART = 0x9E3779B1  # odd, so that different hashes stay different
_RECALL = 0.98
# Below it the index would have to compare nearly everything with everything.
LEAST_THRESHOLD = 0.3


class NearDuplicates(Generic[Key]):
    """Texts seen so far, each in the same number of parts (a prompt, its answers).

    Two are near duplicates if every part of one is at least `threshold` alike the same part of the other: many answers
    to one long prompt are not duplicates of each other.
    """

    def __init__(self, threshold: float):
        if not LEAST_THRESHOLD <= threshold <= 1:
            raise ConfigError(
                f"near duplicates of threshold {threshold:g}: it must be {LEAST_THRESHOLD} to 1, the share of word "
                "triples that two texts have in common; 0.8 is usual"
            )
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ConfigError(
                f"near duplicates need datasketch ({error}); pip install 'rlhf-ray[quality]', or leave "
                "cleaning.near_duplicates empty"
            ) from error
        self._threshold = threshold
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
        self._blank = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=int)
        self._pieces: list[tuple[Key, tuple[np.ndarray, ...]]] = []

    def find(self, parts: Sequence[str]) -> Key | None:
        """The first text that was added and is near this one, by its key."""
        return self._find(pieces := _pieces_of(parts), self._signature(pieces))

    def add(self, key: Key, parts: Sequence[str]) -> None:
        self._add(key, pieces := _pieces_of(parts), self._signature(pieces))

    def find_or_add(self, key: Key, parts: Sequence[str]) -> Key | None:
        """As `find`; a text that is near none is added."""
        pieces = _pieces_of(parts)
        signature = self._signature(pieces)
        found = self._find(pieces, signature)
        if found is None:
            self._add(key, pieces, signature)
        return found

    def _find(self, pieces: tuple[np.ndarray, ...], signature: Any) -> Key | None:
        for place in sorted(self._index.query(signature)):
            key, others = self._pieces[place]
            if len(others) == len(pieces) and all(map(self._are_near, pieces, others)):
                return key
        return None

    def _add(self, key: Key, pieces: tuple[np.ndarray, ...], signature: Any) -> None:
        self._index.insert(len(self._pieces), signature, check_duplication=False)
        self._pieces.append((key, pieces))

    def _are_near(self, some: np.ndarray, others: np.ndarray) -> bool:
        both = len(np.intersect1d(some, others, assume_unique=True))
        return both >= self._threshold * (len(some) + len(others) - both)

    def _signature(self, pieces: tuple[np.ndarray, ...]) -> Any:
        signature = self._blank.copy()
        # A part's number goes into its hashes, so that what one prompt says is not found in another's answer. Where
        # every part is alike by the threshold, their union is too, and the index may look for that.
        hashes = [(own + _PART * part) & 0xFFFFFFFF for part, own in enumerate(pieces)]
        signature.update_batch(np.concatenate(hashes))
        return signature


def similarity(text: str, other: str) -> float:
    """Jaccard's index of the word triples of two texts: 0 (none in common) to 1."""
    (some,), (others,) = _pieces_of([text]), _pieces_of([other])
    both = len(np.intersect1d(some, others, assume_unique=True))
    return both / (len(some) + len(others) - both)


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, rows a band): the most selective ones that find a pair at the threshold with _RECALL.

    Two signatures agree in a band of r values with probability threshold^r (Leskovec et al., "Mining of Massive
    Datasets", section 3.4).
    """
    return next(
        (_PERMUTATIONS // rows, rows)
        for rows in range(_PERMUTATIONS // 2, 0, -1)
        if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= _RECALL
    )


def _pieces_of(parts: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Of each part the sorted 32-bit hashes of its different word triples; at least one."""
    return tuple(np.unique(np.array([_hash(piece) for piece in _triples(part)], dtype=np.uint64)) for part in parts)


def _triples(text: str) -> list[str]:
    folded = fold(text)
    found = _words_and_signs().findall(folded) or [folded.strip()]
    return [" ".join(found[i : i + WORDS_A_PIECE]) for i in range(max(1, len(found) - WORDS_A_PIECE + 1))]


def _hash(piece: str) -> int:
    return int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=4).digest(), "little")


@functools.cache
def _words_and_signs() -> Any:
    return regex.compile(rf"(?V1){WORD}|[\p{{S}}*/%&\-]")
