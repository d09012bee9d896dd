"""Transport `in_process`: learner and generator share one process, tensors travel by reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rlhf_ray.sync.buckets import Layout
from rlhf_ray.sync.export import Pair
from rlhf_ray.sync.sender import BucketSender, WeightClient


class InProcessSender(BucketSender):
    transport = "in_process"

    def send_buckets(self, pairs: Iterator[Pair], client: WeightClient) -> tuple[int, int]:
        layout, tensors, sent, nbytes = Layout(), [], 0, 0
        for name, tensor in pairs:
            if not layout.takes(tensor, self.capacity):
                client.update_weights(_message(layout, tensors, sent, last=False))
                sent, nbytes = sent + 1, nbytes + layout.nbytes
                layout, tensors = Layout(), []
            layout.append(name, tensor)
            # A gathered or merged tensor is only good until the next one is asked for, and vLLM keeps what it
            # gets until a layer is complete.
            tensors.append(tensor.detach().clone())
        if tensors:
            client.update_weights(_message(layout, tensors, sent, last=True))
            sent, nbytes = sent + 1, nbytes + layout.nbytes
        return sent, nbytes


def _message(layout: Layout, tensors: list[Tensor], index: int, *, last: bool) -> dict[str, Any]:
    return {"names": layout.names, "tensors": tensors, "index": index, "last": last}
