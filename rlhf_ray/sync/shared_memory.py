"""Transport `shared_memory`: learner and generators are processes of one host.

Two segments take turns: while the receivers load one bucket, the sender fills the other. They stay mapped from
sync to sync, but lose their names after the first: a learner that is killed leaves nothing in /dev/shm.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.errors import SyncError
from rlhf_ray.sync.buckets import BucketLayout, padded_bytes, write
from rlhf_ray.sync.export import NamedTensor
from rlhf_ray.sync.segment import Segment, attach, default_directory, remove_leftovers
from rlhf_ray.sync.sender import BucketSender, WeightClient

PROBE_BYTES = 16


class SharedMemorySender(BucketSender):
    transport = "shared_memory"

    def __init__(self, *, capacity: int, rank: int = 0, directory: Path | None = None) -> None:
        super().__init__(capacity=capacity, rank=rank)
        self.directory = directory or default_directory()
        self._slots: list[Segment | None] = [None, None]
        self._probe: Segment | None = None
        if rank == 0:
            remove_leftovers(self.directory)

    def init_info(self) -> dict[str, Any]:
        # Two hosts can have equal paths: only equal random bytes prove that this is the same memory.
        nonce = secrets.token_bytes(PROBE_BYTES)
        if self._probe is None:
            self._probe = Segment(PROBE_BYTES, self.directory)
        self._probe.flat.copy_(torch.frombuffer(bytearray(nonce), dtype=torch.uint8))
        return {"transport": self.transport, "probe": str(self._probe.path), "nonce": nonce.hex()}

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
                slot = self._slot(sent % 2, layout.nbytes + padded_bytes(tensor))
                write(slot, layout.append(name, tensor), tensor)
            if layout.names:
                in_flight = self._flush(caller, client, layout, sent, in_flight, last=True)
                sent, nbytes = sent + 1, nbytes + layout.nbytes
            if in_flight is not None:
                in_flight.result()
        for segment in (*self._slots, self._probe):
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
        segment = self._slots[index % 2]
        assert segment is not None
        if in_flight is not None:
            in_flight.result()
        message = {**layout.message(), "segment": str(segment.path), "index": index, "last": last}
        return caller.submit(client.update_weights, message)

    def _slot(self, which: int, needed: int) -> Tensor:
        """The segment's bytes, in a larger segment if one tensor needs more than a bucket."""
        segment = self._slots[which]
        if segment is None or segment.nbytes < needed:
            if segment is not None:
                segment.close()
                self._slots[which] = None
            segment = self._slots[which] = Segment(max(self.capacity, needed), self.directory)
        return segment.flat

    def reset(self) -> None:
        super().reset()
        for segment in (*self._slots, self._probe):
            if segment is not None:
                segment.close()
        self._slots, self._probe = [None, None], None


def check_same_memory(probe: str, nonce: str) -> None:
    """Receiver's half of the handshake. Raises SyncError if the learner's segments are not visible here."""
    found = bytes(attach(probe, PROBE_BYTES)[:PROBE_BYTES].tolist()).hex()
    if found != nonce:
        raise SyncError(
            f"weight sync: {probe} exists here but is not the learner's memory: another host, or a container with "
            "its own /dev/shm; place learner and generators on one host or set sync.transport=nccl"
        )
