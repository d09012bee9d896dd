"""The receiver's book of a weight update: which call may come now, and whether everything arrived."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from rlhf_ray.errors import SyncError

State = Literal["ready", "updating", "broken"]


class SyncSession:
    """A pure state machine. Once broken it stays broken: a half-loaded generator looks healthy, gives wrong
    tokens or dies later, and a second push does not mend it (measured with vLLM). It must be replaced.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.version = 0
        self.state: State = "ready"
        self._reason = ""
        self._names: set[str] = set()
        self._known: frozenset[str] | None = None  # names of the last whole update
        self._next_index = 0
        self._complete: bool | None = None  # None: this transport does not number its buckets

    def start(self) -> None:
        self.require_whole("start a weight update")
        self.state = "updating"
        self._names, self._next_index, self._complete = set(), 0, None

    def receive(self, update_info: Mapping[str, Any]) -> None:
        """Check one bucket's message, before its tensors are loaded."""
        if self.state != "updating":
            raise self.fail(f"a bucket arrived outside of an update (state: {self.state})")
        names: Collection[str] = update_info["names"]
        twice = self._names.intersection(names)
        if twice or len(set(names)) < len(names):
            raise self.fail(f"a tensor came twice in one update: {sorted(twice)[:3] or 'inside one bucket'}")
        index = update_info.get("index")
        if index is not None:
            if index != self._next_index or self._complete:
                raise self.fail(f"bucket {index} arrived where bucket {self._next_index} was due")
            self._next_index += 1
            self._complete = bool(update_info["last"])
        self._names.update(names)

    def check_complete(self) -> None:
        """Whether all was received, before it is put to use."""
        if self.state != "updating":
            raise self.fail(f"finish_weight_update came outside of an update (state: {self.state})")
        if self._complete is False or not self._names:
            raise self.fail(f"the update was finished after {self._next_index} buckets, before its last one")
        if self._known is not None and self._names != self._known:
            missing, new = sorted(self._known - self._names), sorted(self._names - self._known)
            raise self.fail(f"other tensors than in the update before: missing {missing[:3]}, new {new[:3]}")

    def finish(self, weight_version: str | None) -> None:
        """Accept the update. Without a version it counts on by itself."""
        try:
            version = self.version + 1 if weight_version is None else int(weight_version)
        except ValueError:
            raise self.fail(f"weight_version={weight_version!r} is not a number") from None
        self._known = frozenset(self._names)
        self.version = version
        self.state = "ready"

    def fail(self, reason: str) -> SyncError:
        """Mark the receiver broken; returns the error to raise. The first reason is the one remembered."""
        if self.state != "broken":
            self.state, self._reason = "broken", reason
        return SyncError(
            f"{self.owner}: weight update failed: {reason}; it may hold half of the new weights: replace this generator"
        )

    def require_whole(self, action: str) -> None:
        """Raises SyncError unless the receiver holds one whole set of weights."""
        if self.state == "updating":
            # Whoever calls now has given up on the update: nothing will complete it.
            self.fail(f"the update to follow version {self.version} was cut off half-way")
        if self.state == "broken":
            raise SyncError(
                f"{self.owner}: cannot {action}: an earlier weight update failed ({self._reason}); replace this "
                "generator and sync it"
            )
