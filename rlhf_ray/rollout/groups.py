"""A group: everything that answers one prompt. Its answers are rows of the batch that was written with it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from rlhf_ray.algo.advantages import informative_groups
from rlhf_ray.roles.batch import Batch, Rows, gather
from rlhf_ray.roles.protocols import Gather, Scores
from rlhf_ray.roles.requests import Requests


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, as rows of the batch that they were written in."""

    position: int  # in the prompt stream
    version: int  # the weights that it was dispatched at
    rows: tuple[int, ...]  # those that may be learned from, in the members' order
    given: frozenset[int] = frozenset()  # those of `rows` that nobody sampled
    greedy: int | None = None  # ReMax's baseline

    def tokens(self, rows: Rows) -> dict[str, int]:
        """Completion tokens that were `sampled`, written as the `greedy` answer, and `given`."""
        lengths = rows.response_lengths
        given = sum([lengths[row] for row in self.given])
        return {
            "sampled": sum([lengths[row] for row in self.rows]) - given,
            "greedy": 0 if self.greedy is None else lengths[self.greedy],
            "given": given,
        }


def groups_of(requests: Requests, members: int, version: int) -> tuple[Group, ...]:
    """The groups of so many members that the answers to these requests make up; all are made up alike."""
    first = list(requests[:members])
    learned = [member for member, request in enumerate(first) if request.temperature != 0]
    given = [member for member in learned if first[member].answer is not None]
    greedy = next((member for member, request in enumerate(first) if request.temperature == 0), None)
    return tuple(
        Group(
            position, version, tuple([start + member for member in learned]),
            frozenset([start + member for member in given]), None if greedy is None else start + greedy,
        )
        for start, position in zip(
            range(0, len(requests), members), requests.prompt_id[::members].tolist(), strict=True
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """The answers to some prompts that were asked for together, before anyone chooses among them."""

    requests: Requests
    groups: Sequence[Group]
    batch: Batch
    rows: Rows
    scores: Scores

    def of(self, positions: Set[int]) -> list[Group]:
        """The groups that answer these prompts."""
        return [group for group in self.groups if group.position in positions]

    def rows_of(self, positions: Set[int]) -> list[int]:
        """Rows to learn from: the answers to these prompts without the greedy ones."""
        return [row for group in self.of(positions) for row in group.rows]

    def greedy_scores(self, positions: Set[int]) -> torch.Tensor:
        """The reward of the greedy answer to each of `rows_of`'s prompts."""
        return self.scores.score[[group.greedy for group in self.of(positions) for _ in group.rows]]

    def judged(self) -> set[int]:
        """The prompts all of whose answers have a reward."""
        prompts, keep_B = {group.position for group in self.groups}, self.scores.keep
        if keep_B is None:
            return prompts
        return prompts - set(self.requests.prompt_id[~keep_B.numpy()].tolist())

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
    parts = [(answers, rows) for answers in rounds if (rows := answers.rows_of(positions))]
    answers, rows = parts[0]
    if len(parts) == 1 and len(rows) == len(answers.requests):
        return answers.batch
    return gather([(answers.batch, rows) for answers, rows in parts])
