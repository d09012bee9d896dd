"""Replicas of a role that stand alone: who computes which piece of work, and what of a lost one goes out again.

Pure: pieces are labels, replicas numbers, and nothing here knows Ray, a thread or a clock. What a piece is does not
depend on anything here, so neither does the result: not on how many replicas there are, nor on which of them live.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable
from typing import Generic, TypeVar

Piece = TypeVar("Piece", bound=Hashable)

# One that computes a piece has another behind it, so that it need not wait for the driver in between.
MOST_OPEN = 2


class Pool(Generic[Piece]):
    """Pieces that wait, in order, and those that each replica has open.

    Args:
        replicas: how many there are: 0, 1, 2, ...
    """

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.waiting: deque[Piece] = deque()
        # Of those that are there, who was given a piece last at the end.
        self.open: dict[int, list[Piece]] = {replica: [] for replica in range(replicas)}

    def add(self, pieces: Iterable[Piece]) -> None:
        """They wait behind all others."""
        self.waiting.extend(pieces)

    def assign(self, able: Collection[int]) -> list[tuple[int, Piece]]:
        """(replica, piece) of all that is to be sent now, each to whoever has the least open, and of equals has waited
        longest for one.

        A second piece stands behind the first only while more pieces wait than there are replicas: the last ones go
        to whoever is free first.

        Args:
            able: replicas that may get work now.
        """
        sent = []
        while self.waiting and (there := [replica for replica in self.open if replica in able]):
            replica = min(there, key=lambda replica: len(self.open[replica]))
            most = MOST_OPEN if len(self.waiting) > self.replicas else 1
            if len(self.open[replica]) >= most:
                break
            piece = self.waiting.popleft()
            self.open[replica] = [*self.open.pop(replica), piece]  # behind all others, the next time
            sent.append((replica, piece))
        return sent

    def ended(self, piece: Piece) -> None:
        """It is computed, or nobody wants it any more."""
        if piece in self.waiting:
            self.waiting.remove(piece)
        for pieces in self.open.values():
            if piece in pieces:
                pieces.remove(piece)

    def lost(self, replica: int) -> list[Piece]:
        """The replica is gone. What it had open goes out again, before all others; it is returned."""
        again = self.open.pop(replica, [])
        self.waiting.extendleft(reversed(again))
        return again

    def joined(self, replica: int) -> None:
        """It is there again, and has nothing open."""
        self.open[replica] = []
