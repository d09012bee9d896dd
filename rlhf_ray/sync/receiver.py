"""The generator's side of a weight sync: the book of an update, and a receiver for a Hugging Face module.

vLLM loads weights by itself (vllm_transfer.py), and keeps the same book.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ConfigError, SyncError
from rlhf_ray.sync.buckets import read
from rlhf_ray.sync.segment import AttachedSegments
from rlhf_ray.sync.shared_memory import check_same_memory

State = Literal["ready", "updating", "broken"]
TRANSPORTS = ("in_process", "shared_memory")


class SyncSession:
    """Which call may come now, and whether everything arrived: a pure state machine.

    Once broken it stays broken: a half-loaded generator looks healthy, gives wrong tokens or dies later, and a second
    push does not mend it (measured with vLLM). It must be replaced.
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
        """Begin an update, also in the place of one that its sender was lost with: a whole one replaces all of it."""
        if self.state == "broken":
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


class HFReceiver:
    """vLLM's four calls for `module`. Strict: unknown or missing names and other shapes raise SyncError.

    Values are cast to the module's dtype. Transports: in_process, shared_memory.
    """

    def __init__(self, module: nn.Module, *, owner: str = "hf generator") -> None:
        # state_dict lists tied weights under each name, and persistent buffers too.
        self._targets: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
        self._required = {id(p): name for name, p in module.named_parameters()}
        self._covered: set[int] = set()
        self._session = SyncSession(owner)
        self._segments = AttachedSegments()

    @property
    def version(self) -> int:
        return self._session.version

    def require_whole(self, action: str) -> None:
        """Raises SyncError if an update failed or was cut off: call it before the module is used."""
        self._session.require_whole(action)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        transport = init_info.get("transport")
        if transport not in TRANSPORTS:
            raise ConfigError(
                f"{self._session.owner}: cannot receive weights by {transport or 'nccl or cuda_ipc'}, only by "
                f"{' or '.join(TRANSPORTS)}; set sync.transport to one of them, or generator.engine=vllm"
            )
        if transport == "shared_memory":
            check_same_memory(init_info["probe"], init_info["nonce"])

    def start_weight_update(self) -> None:
        self._session.start()
        self._covered = set()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._session.receive(update_info)
        try:
            self._load(self._pairs(update_info))
        except SyncError:
            raise
        except Exception as error:
            raise self._session.fail(f"{type(error).__name__}: {error}") from error

    def _pairs(self, info: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
        if "tensors" in info:
            return zip(info["names"], info["tensors"], strict=True)
        flat = self._segments.flat(info["segment"], info["nbytes"])
        return read(flat, info["names"], info["dtype_names"], info["shapes"], info["offsets"])

    @torch.no_grad()
    def _load(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in pairs:
            target = self._targets.get(name)
            if target is None:
                raise self._session.fail(f"it has no parameter {name!r}: learner and generator are different models")
            if target.shape != tensor.shape:
                raise self._session.fail(
                    f"{name} has shape {tuple(target.shape)} here and {tuple(tensor.shape)} in the learner"
                )
            target.copy_(tensor)
            self._covered.add(id(target))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._session.check_complete()
        missing = [name for key, name in self._required.items() if key not in self._covered]
        if missing:
            raise self._session.fail(f"{len(missing)} parameters were not sent, among them {missing[:3]}")
        self._session.finish(weight_version)

    def close(self) -> None:
        self._segments.close()
