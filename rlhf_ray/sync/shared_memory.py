"""Transport `shared_memory`: learner and generators are processes of one host.

Two segments take turns: while the receivers load one bucket, the sender fills the other. They stay mapped from
sync to sync, but lose their names after the first: a learner that is killed leaves nothing in /dev/shm. Where a lost
generator is replaced, each bucket has a segment of its own, which holds the weights until the next ones come: they can
be sent once more, to one alone, whatever the learner does meanwhile.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.errors import SyncError
from rlhf_ray.sync.buckets import BucketLayout, padded_bytes, write
from rlhf_ray.sync.export import NamedTensor, WeightSource
from rlhf_ray.sync.segment import Segment, attach, default_directory, remove_leftovers
from rlhf_ray.sync.sender import BucketSender, SyncStats, WeightClient

PROBE_BYTES = 16


class SharedMemorySender(BucketSender):
    """
    Args:
        keep: whether what was sent last can be sent again; costs the memory of all weights.
    """

    transport = "shared_memory"

    def __init__(
        self, *, capacity: int, rank: int = 0, directory: Path | None = None, keep: bool = False
    ) -> None:  # fmt: skip
        super().__init__(capacity=capacity, rank=rank)
        self.directory = directory or default_directory()
        self.keep = keep
        self._slots: list[Segment | None] = [None, None]
        self._messages: list[dict[str, Any]] = []  # of the update under way
        self._kept: tuple[int, list[dict[str, Any]]] | None = None  # the version that was sent last, whole
        self._probe: Segment | None = None
        self.turn = Lock()  # weights that are sent again are those of one version
        if rank == 0:
            remove_leftovers(self.directory)

    def init_info(self) -> dict[str, Any]:
        # Two hosts can have equal paths: only equal random bytes prove that this is the same memory.
        nonce = secrets.token_bytes(PROBE_BYTES)
        if self._probe is None:
            self._probe = Segment(PROBE_BYTES, self.directory)
        self._probe.flat.copy_(torch.frombuffer(bytearray(nonce), dtype=torch.uint8))
        return {"transport": self.transport, "probe": str(self._probe.path), "nonce": nonce.hex()}

    def send(self, source: WeightSource, client: WeightClient, version: int) -> SyncStats:
        with self.turn:
            self._kept, self._messages = None, []
            stats = super().send(source, client, version)
            if self.keep and self.rank == 0:
                self._kept = version, self._messages
            return stats

    def send_again(self, client: WeightClient) -> bool:
        """Send the weights that were sent last to one that missed them. False if none were. For `keep`.

        May be called beside the thread that computes, by who holds `turn`. Raises what the client raises.
        """
        if self._kept is None:
            return False
        version, messages = self._kept
        client.init_weight_transfer_engine(self.init_info())
        self._close_probe()
        client.start_weight_update()
        for message in messages:
            client.update_weights(message)
        client.finish_weight_update(str(version))
        return True

    def send_buckets(self, pairs: Iterator[NamedTensor], client: WeightClient) -> tuple[int, int]:
        layout, sent, nbytes = BucketLayout(), 0, 0
        in_flight: Future[None] | None = None
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-sync") as caller:
            for name, tensor in pairs:
                if not layout.takes(tensor, self.capacity):
                    in_flight = self._flush(caller, client, layout, sent, in_flight, last=False)
                    sent, nbytes = sent + 1, nbytes + layout.nbytes
                    layout = BucketLayout()
                # Straight into shared memory: a gathered or merged tensor is only good until the next one.
                slot = self._slot(sent if self.keep else sent % 2, layout.nbytes + padded_bytes(tensor))
                write(slot, layout.append(name, tensor), tensor)
            if layout.names:
                in_flight = self._flush(caller, client, layout, sent, in_flight, last=True)
                sent, nbytes = sent + 1, nbytes + layout.nbytes
            if in_flight is not None:
                in_flight.result()
        self._close_probe()
        for segment in self._slots if not self.keep else ():
            if segment is not None:
                segment.close()  # every receiver has mapped it by now
        return sent, nbytes

    def _flush(
        self,
        caller: ThreadPoolExecutor,
        client: WeightClient,
        layout: BucketLayout,
        index: int,
        in_flight: Future[None] | None,
        *,
        last: bool,
    ) -> Future[None]:
        """Hand a full bucket to the receivers; returns once the one before is loaded and its slot free."""
        segment = self._slots[index if self.keep else index % 2]
        assert segment is not None
        if in_flight is not None:
            in_flight.result()
        message = {**layout.message(), "segment": str(segment.path), "index": index, "last": last}
        if self.keep:
            self._messages.append(message)
        return caller.submit(client.update_weights, message)

    def _slot(self, which: int, needed: int) -> Tensor:
        """The segment's bytes, in a larger segment if one tensor needs more than a bucket."""
        self._slots += [None] * (which + 1 - len(self._slots))
        segment = self._slots[which]
        if segment is None or segment.nbytes < needed:
            if segment is not None:
                segment.close()
                self._slots[which] = None
            segment = self._slots[which] = Segment(
                max(self.capacity, needed), self.directory, nameless=self.keep
            )  # fmt: skip
        return segment.flat

    def reset(self) -> None:
        super().reset()
        self._close_probe()
        for segment in self._slots:
            if segment is not None:
                segment.close()
        self._slots = [None, None]

    def _close_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
        self._probe = None


def check_same_memory(probe: str, nonce: str) -> None:
    """Receiver's half of the handshake. Raises SyncError if the learner's segments are not visible here."""
    found = bytes(attach(probe, PROBE_BYTES)[:PROBE_BYTES].tolist()).hex()
    if found != nonce:
        raise SyncError(
            f"weight sync: {probe} exists here but is not the learner's memory: another host, or a container with "
            "its own /dev/shm; place learner and generators on one host or set sync.transport=nccl"
        )
