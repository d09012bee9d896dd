"""Which prompt positions are open, finished, learned from or given up, and with which weights each was dispatched.

Pure arithmetic: it knows no tensor, no thread and no clock. Nothing is lost silently, for at every moment

    sampled = learned + stale + filtered + failed + baseline + lost + open

in samples and in tokens. Tokens are counted when a group is finished, so an unfinished one has none yet. Answers that
came with the data were not sampled: `given` counts them apart, as they are learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# learned: reached the learner. stale: too old for it. filtered: judged, and not chosen. failed: not judged in full.
Outcome = Literal["learned", "stale", "filtered", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("learned", "stale", "filtered", "failed")
# Where a sample can be beside that. baseline: ReMax's greedy answers, whatever becomes of their group. lost: gone
# with a worker or with weights that the run has left.
TERMS = (*OUTCOMES, "baseline", "lost", "open")


class Count(NamedTuple):  # and not a dataclass: a step makes several for each of its groups
    samples: int = 0
    tokens: int = 0

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(self.samples + other.samples, self.tokens + other.tokens)

    def __sub__(self, other: Count) -> Count:
        return Count(self.samples - other.samples, self.tokens - other.tokens)


class Entry(NamedTuple):
    """A group that was dispatched and that nobody has decided on. Tokens are 0 until it is finished."""

    step: int  # that it was dispatched for
    version: int  # of the weights that it was dispatched at
    sampled: Count  # without the greedy answer
    greedy: Count = Count()
    given: Count = Count()
    finished: bool = False

    @property
    def written(self) -> Count:
        return self.sampled + self.greedy


@dataclass
class Ledger:
    """The books of a run. `max_staleness`: versions that a group may be older than its learner.

    Under this rule, the strictest one, step k is dispatched at version k - max_staleness exactly (at the first version
    of the run, or of its resumption, where there is no such), so a run that is repeated dispatches the same.
    """

    max_staleness: int = 0
    first_version: int = 0  # no weights before these are to be had
    position: int = 0  # every position before it has been dispatched, but for those in `again`
    again: list[int] = field(default_factory=list)  # lost positions, which go out first
    open: dict[int, Entry] = field(default_factory=dict)  # by position
    sampled: Count = Count()
    given: Count = Count()
    settled: dict[str, Count] = field(default_factory=lambda: dict.fromkeys(TERMS[:-1], Count()))

    def version_for(self, step: int) -> int:
        """The version that this step's groups are dispatched at."""
        return max(step - self.max_staleness, self.first_version)

    def too_old(self, position: int, step: int) -> bool:
        """Whether this open group may not be learned from in this step."""
        return self.open[position].version < step - self.max_staleness

    def dispatch(self, count: int, *, step: int, sampled: int, greedy: int = 0, given: int = 0) -> list[int]:
        """The next `count` prompt positions, each asked for so many answers; in order, none twice and none left out."""
        positions, self.again = self.again[:count], self.again[count:]
        fresh = count - len(positions)
        positions += range(self.position, self.position + fresh)
        self.position += fresh
        entry = Entry(step, self.version_for(step), Count(sampled), Count(greedy), Count(given))
        self.open |= dict.fromkeys(positions, entry)
        self.sampled += Count(count * entry.written.samples)
        return positions

    def finish(self, position: int, *, sampled: int, greedy: int = 0, given: int = 0) -> None:
        """The group is written, in so many tokens."""
        entry = self.open[position]
        if entry.finished:
            raise ValueError(f"the group of prompt {position} is finished already")
        self.open[position] = Entry(
            entry.step, entry.version, Count(entry.sampled.samples, sampled), Count(entry.greedy.samples, greedy),
            Count(entry.given.samples, given), finished=True,
        )  # fmt: skip
        self.sampled += Count(0, sampled + greedy)

    def settle(self, position: int, outcome: Outcome) -> None:
        """What became of a finished group."""
        if not self.open[position].finished:
            raise ValueError(f"the group of prompt {position} is not finished, so it cannot be {outcome}")
        entry = self.open.pop(position)
        self.settled[outcome] += entry.sampled
        self.settled["baseline"] += entry.greedy
        if outcome == "learned":
            self.given += entry.given

    def lose(self, position: int) -> None:
        """The group is gone, finished or not; its prompt goes out again."""
        self.settled["lost"] += self.open.pop(position).written
        self.again = sorted([*self.again, position])

    def rewind(self, version: int) -> list[int]:
        """The learner went back to this version: what later weights have written is lost. Returns the positions."""
        gone = sorted(position for position, entry in self.open.items() if entry.version > version)
        for position in gone:
            self.lose(position)
        return gone

    def leave(self, sampled: Count) -> None:
        """So much had been sampled when the run went back to these books: what they do not know of is lost."""
        gone = sampled - self.sampled
        if gone.samples > 0:  # a run that is resumed in a new process knows of none
            self.sampled += gone
            self.settled["lost"] += gone

    def counts(self, before: int | None = None) -> dict[str, Count]:
        """`sampled`, the terms of the law, and `given`.

        `before`: as if nothing had been dispatched at this version or a later one, which depends on no clock.
        """
        hidden = [entry for entry in self.open.values() if before is not None and entry.version >= before]
        shown = [entry for entry in self.open.values() if before is None or entry.version < before]
        sampled = self.sampled - sum((entry.written for entry in hidden), Count())
        terms = {**self.settled, "open": sum((entry.written for entry in shown), Count())}
        return {"sampled": sampled, **terms, "given": self.given}

    def metrics(self, before: int | None = None) -> dict[str, float]:
        """`ledger/<name>` in samples and `ledger/<name>_tokens`, since the run began."""
        counts = self.counts(before)
        samples = {f"ledger/{name}": float(count.samples) for name, count in counts.items()}
        return samples | {f"ledger/{name}_tokens": float(count.tokens) for name, count in counts.items()}

    def state_dict(self, before: int | None = None) -> dict[str, Any]:
        """The books as plain data, for a run that goes on from here: groups that are not finished, and those dispatched
        at `before` or later, will be dispatched anew, and are as if they had never been."""
        kept = {
            position: entry for position, entry in sorted(self.open.items())
            if entry.finished and (before is None or entry.version < before)
        }  # fmt: skip
        undone = [position for position in self.open if position not in kept]
        dropped = sum((self.open[position].written for position in undone), Count())
        position, again = self.position, sorted([*self.again, *undone])
        while again and again[-1] == position - 1:
            position = again.pop()
        return {
            "position": position,
            "again": again,
            "open": {place: _plain(entry) for place, entry in kept.items()},
            "sampled": _pair(self.sampled - dropped),
            "given": _pair(self.given),
            "settled": {name: _pair(count) for name, count in self.settled.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these books. A state without counts is of an older version: they begin with 0 here."""
        self.position = int(state["position"])
        self.again = list(state.get("again", ()))
        self.open = {int(place): _entry(plain) for place, plain in state.get("open", {}).items()}
        self.sampled = Count(*state.get("sampled", ()))
        self.given = Count(*state.get("given", ()))
        settled = state.get("settled", {})
        self.settled = {name: Count(*settled.get(name, ())) for name in TERMS[:-1]}


def _pair(count: Count) -> list[int]:
    return [count.samples, count.tokens]


def _plain(entry: Entry) -> list[Any]:
    return [entry.step, entry.version, *(_pair(count) for count in (entry.sampled, entry.greedy, entry.given))]


def _entry(plain: Sequence[Any]) -> Entry:
    step, version, *counts = plain
    return Entry(step, version, *(Count(*pair) for pair in counts), finished=True)
