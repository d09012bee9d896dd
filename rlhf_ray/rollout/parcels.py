"""Rewards as groups end: a step's rows are judged in parcels, each as soon as all of its groups have been written.

Which rows share a parcel depends on the step's rows alone, never on who wrote them or when: parcels are cut from the
step in its order, whole groups at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.protocols import Reward, Scores
from rlhf_ray.run.timer import Timer

# A smaller parcel would cost more calls than it saves time: reward servers and networks take 64 rows at once.
LEAST_ROWS = 64
# The last parcel waits for the last answer, so this many leave a quarter of the judging behind the writing. More would
# leave less, but a judge that is slow to answer, however few rows it is asked about, is asked once a parcel.
MOST = 4


def parcels_of(groups: int, members: int) -> list[range]:
    """Rows of each parcel; the groups, of so many rows each, are spread evenly."""
    count = min(MOST, groups, max(1, groups * members // LEAST_ROWS))
    cuts = [groups * i // count * members for i in range(count + 1)]
    return [range(start, end) for start, end in zip(cuts, cuts[1:], strict=False)]


class Judging:
    """The rewards of some parcels; one is judged at a time, in a thread, while others are being written. If there is
    only one, it is judged where `scores` is called.

    Args:
        texts: so many of all rows come with their texts.
        timer: `reward` measures the time in which rewards are computed.
    """

    def __init__(self, reward: Reward, parcels: Sequence[range], texts: int, timer: Timer) -> None:
        self.reward, self.parcels, self.texts, self.timer = reward, parcels, texts, timer
        self._threads = ThreadPoolExecutor(1, "rewards")
        self._found: list[Future[Scores] | None] = [None] * len(parcels)

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *error: Any) -> None:
        # After a failure nobody waits for a judge that hangs: it ends with the run.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def written(self, parcel: int, batch: Batch) -> None:
        """All of this parcel has been written. Raises what judging an earlier one has raised by now."""
        for found in self._found:
            if found is not None and found.done():
                found.result()
        self._found[parcel] = self._threads.submit(self._judge, self.parcels[parcel], batch)

    def _judge(self, rows: range, batch: Batch) -> Scores:
        with self.timer("reward"):
            return self.reward.score(batch, texts=min(len(rows), max(0, self.texts - rows.start)), first=rows.start)

    def scores(self, batch: Batch) -> Scores:
        """Of all rows, once they are judged, as one call would have returned them. `batch`: all of them."""
        if len(self.parcels) > 1:
            return whole([found.result() for found in self._found])
        with self.timer("reward"):
            return self.reward.score(batch, texts=self.texts)


def whole(parts: Sequence[Scores]) -> Scores:
    """The scores of parcels, in their order, as those of one call."""
    cat = Scores.cat(parts)
    keep_B = None
    if any(part.keep is not None for part in parts):
        keep_B = torch.cat([torch.ones(len(p.score), dtype=torch.bool) if p.keep is None else p.keep for p in parts])
    events = [event for part in parts for event in part.events]
    named = [[event for event in events if event["reward"] == name] for name in cat.by_function]
    ids = tuple(row for part in parts for row in part.completion_ids)
    return Scores(
        cat.score, cat.by_function, cat.texts, keep_B, combine_stats(part.stats for part in parts),
        tuple(_joined(own) for own in named if own), ids,
    )  # fmt: skip


def _joined(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was done about one function's failures in several parcels, as one call would tell it."""
    told = next((event for event in events if event["rows"]), events[0])
    return {**told, **{name: sum(event[name] for event in events) for name in ("rows", "retries")}}
