"""Who writes which group: each goes to the generator with the least open work that has room for it.

Pure: groups and workers are numbers, and nothing here knows Ray, a thread or a clock. What is written depends on none
of it, for an answer's tokens are a function of its seed, its prompt and the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# About so many times in a step a generator hands over what has ended: each time costs the driver a millisecond.
HANDOVERS = 8


class Dispatch:
    """Groups that wait, in order, and those that each worker has open.

    Args:
        work: [groups] tokens that each may still cost.
        rows: [groups] answers of each.
        workers: how many there are: 0, 1, 2, ...
        room: answers that a worker may have open, so that a slow one does not hoard what others could write. One that
            has none takes a group of any size.
    """

    def __init__(self, work: Sequence[int], rows: Sequence[int], workers: int, room: float) -> None:
        self.work, self.rows, self.room = work, rows, room
        self.waiting = deque(range(len(work)))
        self.open: dict[int, list[int]] = {worker: [] for worker in range(workers)}
        self._load = dict.fromkeys(self.open, 0)  # of all that a worker has open: its work,
        self._held = dict.fromkeys(self.open, 0)  # and its answers

    @property
    def done(self) -> bool:
        """Every group has ended."""
        return not self.waiting and not any(self.open.values())

    def assign(self) -> dict[int, list[int]]:
        """The groups to send now, by worker: one by one to whoever has the least open work, the first of equals."""
        load, held = self._load, self._held
        sent: dict[int, list[int]] = {}
        while self.waiting:
            group = self.waiting[0]
            able = [worker for worker in load if not held[worker] or held[worker] + self.rows[group] <= self.room]
            if not able:
                break
            worker = min(able, key=lambda worker: (load[worker], worker))
            self.open[worker].append(self.waiting.popleft())
            sent.setdefault(worker, []).append(group)
            load[worker] += self.work[group]
            held[worker] += self.rows[group]
        return sent

    def ended(self, worker: int, groups: Sequence[int]) -> None:
        """The worker has written them."""
        gone = set(groups)
        self.open[worker] = [group for group in self.open[worker] if group not in gone]
        self._load[worker] -= sum(self.work[group] for group in groups)
        self._held[worker] -= sum(self.rows[group] for group in groups)

    def joined(self, worker: int) -> None:
        """It is there again, and has nothing open."""
        self.open[worker], self._load[worker], self._held[worker] = [], 0, 0

    def lost(self, worker: int) -> list[int]:
        """The worker is gone. The groups that it had open go out again, before all others; they are returned."""
        again = sorted(self.open.pop(worker))
        del self._load[worker], self._held[worker]
        self.waiting.extendleft(reversed(again))
        return again


def handover(groups: int, workers: int) -> int:
    """How many groups a worker writes to the end before it hands them over together."""
    return max(1, groups // (HANDOVERS * workers))
