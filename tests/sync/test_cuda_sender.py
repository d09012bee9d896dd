"""nccl and cuda_ipc up to the point where a GPU would be needed. Not run on hardware here."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from rlhf_ray.errors import ConfigError, SyncError
from rlhf_ray.models.pretrained import plain_state
from rlhf_ray.sync import cuda_sender
from rlhf_ray.sync.factory import make_sender


class FakeVllm:
    """Stands for `vllm_transfer.open_channel`: keeps what it was given, sends in two calls."""

    def __init__(self) -> None:
        self.opened: list[dict] = []
        self.closed = 0
        self.sent: list[list[str]] = []
        self.fail = False

    def open_channel(self, plan: dict):
        self.opened.append(plan)
        return self.send, self.shut

    def send(self) -> None:
        given = self.opened[-1]
        names = []
        for name, _ in given["stream"]():
            names.append(name)
            if self.fail:
                raise RuntimeError("ncclSystemError")
        self.sent.append(names)
        if given["rank"] == 0:
            client = given["client"]
            client.start_weight_update()
            client.update_weights({"names": names[:2]})
            client.update_weights({"names": names[2:]})
            client.finish_weight_update()

    def shut(self) -> None:
        self.closed += 1


@pytest.fixture
def fake(monkeypatch) -> Iterator[FakeVllm]:
    fake = FakeVllm()
    vllm = SimpleNamespace(open_channel=fake.open_channel, ChannelPlan=dict, Rendezvous=dict)
    monkeypatch.setattr(cuda_sender, "_vllm_side", lambda: vllm)
    yield fake


def test_nccl_group_counts_learner_and_all_workers(fake, make_tied, recorder):
    sender = make_sender("nccl", receivers=6, address="node-a", bucket_mb=1, device="cpu")
    stats = sender.send(lambda: plain_state(make_tied()), recorder, 3)
    opened = fake.opened[0]
    assert opened["backend"] == "nccl" and opened["buffer_bytes"] == 2**20
    assert opened["rendezvous"]["address"] == "node-a" and opened["rendezvous"]["world_size"] == 7
    assert 0 < opened["rendezvous"]["port"] < 65536
    assert [(m.name, m.shape) for m in opened["metadata"]()] == [
        ("embed.weight", (4, 2)),
        ("body.weight", (2, 2)),
        ("body.bias", (2,)),
        ("head.weight", (4, 2)),
    ]
    assert recorder.calls[-1] == ("finish", "3")  # vLLM's own engines do not pass the version on
    assert stats.buckets == 2 and stats.gigabytes == pytest.approx(88e-9)  # 22 floats


def test_on_a_gpu_the_optimiser_is_waited_for_and_the_thread_keeps_its_stream(fake, recorder, monkeypatch):
    """vLLM's senders read on streams of their own, and opening their channel would move this thread to one."""
    log: list[str] = []
    fake_cuda = {
        "synchronize": lambda device: log.append("synchronize"),
        "current_stream": lambda device: log.append("stream?") or "default",
        "set_stream": lambda stream: log.append(f"stream={stream}"),
    }
    for name, function in fake_cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    opened = fake.open_channel
    monkeypatch.setattr(fake, "open_channel", lambda plan: log.append("open") or opened(plan))
    monkeypatch.setattr(cuda_sender._vllm_side(), "open_channel", fake.open_channel)
    sender = make_sender("cuda_ipc", bucket_mb=1, device="cuda")
    for version in (1, 2):
        sender.send(lambda: plain_state(torch.nn.Linear(2, 2)), recorder, version)
    assert log == ["synchronize", "stream?", "open", "stream=default", "synchronize"]


def test_ipc_has_no_rendezvous_and_a_buffer_that_holds_the_largest_tensor(fake, recorder):
    sender = make_sender("cuda_ipc", bucket_mb=0.001, device="cpu")
    sender.send(lambda: plain_state(torch.nn.Linear(100, 100)), recorder, 1)
    assert fake.opened[0]["backend"] == "ipc" and fake.opened[0]["rendezvous"] is None
    assert fake.opened[0]["buffer_bytes"] == 40_000


def test_channel_is_kept_until_the_receivers_change(fake, make_tied, recorder, make_recorder):
    sender = make_sender("nccl", device="cpu")
    for version in (1, 2):
        sender.send(lambda: plain_state(make_tied()), recorder, version)
    assert len(fake.opened) == 1 and fake.closed == 0
    sender.send(lambda: plain_state(make_tied()), make_recorder(), 3)
    assert len(fake.opened) == 2 and fake.closed == 1
    sender.reset()
    sender.send(lambda: plain_state(make_tied()), recorder, 4)
    assert len(fake.opened) == 3 and fake.closed == 2
    sender.close()
    assert fake.closed == 3


def test_failure_drains_the_export_and_drops_the_channel(fake, make_tied, recorder):
    seen = []

    def pairs():
        for name, tensor in plain_state(make_tied()):
            seen.append(name)
            yield name, tensor

    sender = make_sender("nccl", device="cpu")
    fake.fail = True
    with pytest.raises(SyncError, match="nccl.*version 9 failed: RuntimeError: ncclSystemError.*replaced"):
        sender.send(pairs, recorder, 9)
    assert len(seen) == 8  # once for the metadata, once to the end of the failed send
    assert fake.closed == 0  # destroying a communicator whose peer hangs would hang
    fake.fail = False
    sender.send(pairs, recorder, 10)
    assert len(fake.opened) == 2


def test_other_ranks_iterate_and_report_nothing(fake, make_tied, recorder):
    stats = make_sender("cuda_ipc", rank=1, device="cpu").send(lambda: plain_state(make_tied()), recorder, 1)
    assert len(fake.sent) == 1 and recorder.calls == [] and stats.gigabytes == 0.0


def test_without_vllm_the_remedy_is_named(monkeypatch, make_tied, recorder):
    monkeypatch.setitem(__import__("sys").modules, "rlhf_ray.sync.vllm_transfer", None)
    with pytest.raises(ConfigError, match=r"rlhf-ray\[vllm\].*sync.transport=shared_memory"):
        make_sender("nccl", device="cpu").send(lambda: plain_state(make_tied()), recorder, 1)


def test_export_that_gives_nothing_is_an_error(fake, recorder):
    with pytest.raises(SyncError, match="exported no tensor"):
        make_sender("nccl", device="cpu").send(lambda: iter(()), recorder, 1)
