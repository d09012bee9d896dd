"""Groups: all that answers one prompt. They are rows of the batch that they were written in, and judged as they end.

A step's rows are judged in parcels, each as soon as all of its groups have been written. Which rows share a parcel
depends on the step's rows alone, never on who wrote them or when: parcels are cut from the step in its order, whole
groups at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_ray.algo.advantages import informative_groups
from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.roles.batch import Batch, Rows, gather
from rlhf_ray.roles.protocols import Gather, Reward, Scores
from rlhf_ray.roles.requests import Requests
from rlhf_ray.run.background import Background
from rlhf_ray.run.timer import Timer

# A smaller parcel would cost more calls than it saves time: reward servers and networks take 64 rows at once.
LEAST_ROWS = 64
# The last parcel waits for the last answer, so this many leave a quarter of the judging behind the writing. More would
# leave less, but a judge that is slow to answer, however few rows it is asked about, is asked once a parcel.
MOST = 4
NAMED = 8  # prompts in a sentence


@dataclass(frozen=True, eq=False)
class Groups:
    """The answers to G prompts, which were asked alike, as rows of the batch that they were written in."""

    positions: np.ndarray  # [G] in the prompt stream
    version: int  # the weights that they were dispatched at
    rows: np.ndarray  # [G, M] those that may be learned from, in the members' order
    given: int = 0  # how many of the last of these, in each group, nobody sampled
    greedy: np.ndarray | None = None  # [G] ReMax's baselines

    def __len__(self) -> int:
        return len(self.positions)

    def tokens(self, rows: Rows) -> Iterator[tuple[int, dict[str, int]]]:
        """Of each group its position, and completion tokens that were `sampled`, written as the `greedy` answer, and
        `given`."""
        length_GM = rows.response_lengths[self.rows]
        sampled = self.rows.shape[1] - self.given
        columns = {"sampled": length_GM[:, :sampled].sum(1), "given": length_GM[:, sampled:].sum(1)}
        if self.greedy is not None:
            columns["greedy"] = rows.response_lengths[self.greedy]
        counts = zip(*(column.tolist() for column in columns.values()), strict=True)
        for position, numbers in zip(self.positions.tolist(), counts, strict=True):
            yield position, dict(zip(columns, numbers, strict=True))


def groups_of(requests: Requests, members: int, version: int) -> Groups:
    """The groups of so many members that the answers to these requests make up; all are made up alike: sampled answers
    first, then given ones, then the greedy one."""
    first = list(requests[:members])
    greedy = sum(request.temperature == 0 for request in first)
    given = sum(request.answer is not None for request in first)
    rows = np.arange(len(requests)).reshape(-1, members)
    return Groups(
        requests.prompt_id[::members], version, rows[:, : members - greedy], given, rows[:, -1] if greedy else None
    )


@dataclass(frozen=True)
class Answers:
    """The answers to some prompts that were asked for together, before anyone chooses among them."""

    requests: Requests
    groups: Groups
    batch: Batch
    rows: Rows
    scores: Scores

    def _of(self, positions: Set[int]) -> np.ndarray:
        """[G] whether a group answers one of these prompts."""
        return np.isin(self.groups.positions, list(positions))

    def rows_of(self, positions: Set[int]) -> np.ndarray:
        """Rows to learn from: the answers to these prompts without the greedy ones."""
        return self.groups.rows[self._of(positions)].ravel()

    def greedy_scores(self, positions: Set[int]) -> torch.Tensor:
        """The reward of the greedy answer to each of `rows_of`'s prompts."""
        greedy = self.groups.greedy[self._of(positions)]
        return self.scores.score[np.repeat(greedy, self.groups.rows.shape[1])]

    def judged(self) -> set[int]:
        """The prompts all of whose answers have a reward, and log-probabilities that are numbers."""
        prompts, keep_B = set(self.groups.positions.tolist()) - self.broken(), self.scores.keep
        if keep_B is None:
            return prompts
        return prompts - set(self.requests.prompt_id[~keep_B.numpy()].tolist())

    def broken(self) -> set[int]:
        """The prompts with an answer some of whose log-probabilities are not finite: one in a loss would make it so."""
        return set(self.requests.prompt_id[~self.rows.finite].tolist())

    def broken_events(self) -> Iterator[dict[str, Any]]:
        """For events.jsonl: each writer of such answers."""
        by_writer: dict[str, list[int]] = {}
        for row in np.flatnonzero(~self.rows.finite).tolist():
            by_writer.setdefault(self.batch.writer_of(row), []).append(row)
        for writer, rows in by_writer.items():
            prompts = sorted(set(self.requests.prompt_id[rows].tolist()))
            more = ", ..." if len(prompts) > NAMED else ""
            reason = (
                f"{writer}: {len(rows)} answers have log-probabilities that are not finite; the groups of prompts "
                f"{', '.join(map(str, prompts[:NAMED]))}{more} are left out"
            )
            yield {
                "kind": "not_finite", "worker": writer, "action": "drop_group", "rows": len(rows), "prompts": prompts,
                "reason": reason,
            }  # fmt: skip

    def informative(self) -> set[int]:
        """Those whose answers earn different rewards."""
        rows = self.rows_of(self.judged())
        prompt_B = torch.from_numpy(self.requests.prompt_id[rows])
        keep_B = informative_groups(self.scores.score[rows], prompt_B)
        return set(prompt_B[keep_B].tolist())


def joined(rounds: Sequence[Answers], positions: Set[int]) -> tuple[Rows, Scores]:
    """All answers to these prompts but the greedy ones, as far as plain numbers tell of them."""
    picked = [(answers, answers.rows_of(positions)) for answers in rounds]
    # Of thousands of rows a copy costs more than all else here, and most often there is one round of which all stay.
    kept = [a.rows if len(rows) == len(a.rows) else a.rows.select(rows) for a, rows in picked]
    rows = kept[0] if len(kept) == 1 else Rows.cat(kept)
    return rows, Scores.cat([answers.scores.select(rows) for answers, rows in picked])


def gathered(rounds: Sequence[Answers], positions: Set[int], gather: Gather = gather) -> Batch:
    """The same rows as one batch."""
    parts = [(answers, rows) for answers in rounds if len(rows := answers.rows_of(positions))]
    answers, rows = parts[0]
    if len(parts) == 1 and len(rows) == len(answers.requests):
        return answers.batch
    return gather([(answers.batch, rows) for answers, rows in parts])


# ---- how they are judged ----------------------------------------------------------------------------------------


def parcels_of(groups: int, members: int, judges: int = 1) -> list[range]:
    """Rows of each parcel; the groups, of so many rows each, are spread evenly. `judges`: how many there are by the
    config, for how many are alive must change nothing."""
    count = min(max(MOST, judges), groups, max(1, groups * members // LEAST_ROWS))
    cuts = [groups * i // count * members for i in range(count + 1)]
    return [range(start, end) for start, end in zip(cuts, cuts[1:], strict=False)]


class Judging:
    """The rewards of some parcels, judged in threads while others are being written. If there is only one, it is judged
    where `scores` is called.

    Args:
        texts: so many of all rows come with their texts.
        timer: `reward` measures the time in which rewards are computed.
        judges: so many parcels are judged at a time.
    """

    def __init__(self, reward: Reward, parcels: Sequence[range], texts: int, timer: Timer, judges: int = 1) -> None:
        self.reward, self.parcels, self.texts, self.timer = reward, parcels, texts, timer
        self._threads = Background(judges, "rewards")
        self._found: list[Future[Scores] | None] = [None] * len(parcels)

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *error: Any) -> None:
        # After a failure nobody waits for a judge that hangs: it ends with the run.
        self._threads.close()

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
