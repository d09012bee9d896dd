"""in_process and shared_memory into a plain module of this process; failures on the way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rlhf_ray.errors import ConfigError, SyncError, WorkerError
from rlhf_ray.models.pretrained import plain_state
from rlhf_ray.sync.cuda_sender import shift_ranks
from rlhf_ray.sync.factory import make_sender
from rlhf_ray.sync.receiver import HFReceiver
from rlhf_ray.sync.segment import PREFIX

KIB = 1 / 1024  # in MiB


@pytest.fixture(params=["in_process", "shared_memory"])
def sender(request, tmp_path) -> Iterator:
    """Buckets of 64 bytes: each tensor of `Tied` travels alone."""
    sender = make_sender(request.param, bucket_mb=KIB / 16, directory=tmp_path)
    yield sender
    sender.close()
    assert not list(tmp_path.glob(f"{PREFIX}*"))  # nothing stays behind


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_three_syncs(sender, make_tied):
    target = make_tied(0)
    receiver = HFReceiver(target)
    for version in (1, 2, 3):
        learner = make_tied(version)
        stats = sender.send(lambda learner=learner: plain_state(learner), receiver, version)
        assert same(learner, target) and receiver.version == version
        # embed 32 bytes, body 16 and 8, head 32: each padded to 64
        assert (stats.buckets, stats.gigabytes) == (4, 256e-9)
        assert stats.seconds > 0 and stats.gigabytes_per_second == stats.gigabytes / stats.seconds


def test_one_bucket_when_all_fits(tmp_path, make_tied, recorder):
    sender = make_sender("in_process", bucket_mb=1)
    sender.send(lambda: plain_state(make_tied()), recorder, 5)
    assert recorder.order == ["init", "start", "update", "finish"]
    assert recorder.calls[-1] == ("finish", "5")
    assert recorder.calls[2][1]["last"] is True
    sender.send(lambda: plain_state(make_tied()), recorder, 6)
    assert recorder.order[4:] == ["start", "update", "finish"]  # the handshake is made once
    sender.reset()
    sender.send(lambda: plain_state(make_tied()), recorder, 7)
    assert recorder.order[7:] == ["init", "start", "update", "finish"]


def test_a_tensor_larger_than_a_bucket_travels_alone(sender):
    learner, target = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)
    stats = sender.send(lambda: plain_state(learner), HFReceiver(target), 1)
    assert stats.buckets == 2 and same(learner, target)


def test_tensors_need_only_live_until_the_next_one(sender):
    """As with ZeRO-3, whose gathered buffer is reused."""
    target = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(5)))

    def reused():
        buffer = torch.empty(2, 2)
        for i in range(5):
            buffer.fill_(i)
            yield f"{i}.weight", buffer
        buffer.fill_(-1)

    sender.send(reused, HFReceiver(target), 1)
    assert [layer.weight[0, 0].item() for layer in target] == [0, 1, 2, 3, 4]


def test_learner_in_float32_generator_in_bfloat16(sender, make_tied):
    learner, target = make_tied(1), make_tied(2).to(torch.bfloat16)
    sender.send(lambda: plain_state(learner), HFReceiver(target), 1)
    assert torch.equal(target.body.weight, learner.body.weight.to(torch.bfloat16))


def test_other_ranks_only_iterate(make_tied, recorder):
    seen = []
    pairs = ((name, seen.append(name)) for name, _ in plain_state(make_tied()))
    stats = make_sender("in_process", rank=1).send(lambda: pairs, recorder, 1)
    assert len(seen) == 4 and recorder.calls == [] and stats.buckets == 0


def test_failed_send_still_iterates_to_the_end(sender, make_tied, make_recorder):
    """Else the other ranks would wait in their gathers for ever."""
    seen = []

    def pairs():
        for name, tensor in plain_state(make_tied()):
            seen.append(name)
            yield name, tensor

    client = make_recorder(fail_at=1)
    with pytest.raises(SyncError, match="cable pulled.*replaced"):
        sender.send(pairs, client, 1)
    assert len(seen) == 4 and "finish" not in client.order


def test_errors_of_this_package_keep_their_type(sender, make_tied, recorder):
    def dead(_info):
        raise WorkerError("generator 2 on node b died")

    recorder.update_weights = dead
    with pytest.raises(WorkerError, match="generator 2"):
        sender.send(lambda: plain_state(make_tied()), recorder, 1)


def test_export_that_gives_nothing_is_an_error(sender, recorder):
    with pytest.raises(SyncError, match="exported no tensor"):
        sender.send(lambda: iter(()), recorder, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs + [("ghost", torch.zeros(1))], "no parameter 'ghost'"),
        (lambda pairs: [p for p in pairs if p[0] != "body.bias"], "1 parameters were not sent.*body.bias"),
        (lambda pairs: [(n, t.t() if n == "embed.weight" else t) for n, t in pairs], r"\(4, 2\) here and \(2, 4\)"),
    ],
)
def test_strict_receiver(sender, make_tied, change, message):
    receiver = HFReceiver(make_tied(0))
    pairs = change(list(plain_state(make_tied(1))))
    with pytest.raises(SyncError, match=message):
        sender.send(lambda: pairs, receiver, 1)
    with pytest.raises(SyncError, match="replace this generator"):
        receiver.require_whole("generate")
    with pytest.raises(SyncError):
        sender.send(lambda: plain_state(make_tied(1)), receiver, 2)


def test_one_of_two_tied_names_is_enough(sender, make_tied):
    target = make_tied(0)
    sender.send(lambda: make_tied(1).named_parameters(), HFReceiver(target), 1)
    assert same(target, make_tied(1)) and target.head.weight is target.embed.weight


def test_cut_half_way(sender, make_tied):
    receiver = HFReceiver(make_tied(0))

    def dies():
        yield from list(plain_state(make_tied(1)))[:2]
        raise RuntimeError("learner out of memory")

    with pytest.raises(SyncError, match="out of memory"):
        sender.send(dies, receiver, 1)
    assert receiver.version == 0
    with pytest.raises(SyncError, match="cut off half-way"):
        receiver.require_whole("generate")


def test_hf_refuses_cuda_transports(make_tied):
    with pytest.raises(ConfigError, match="in_process or shared_memory.*generator.engine=vllm"):
        HFReceiver(make_tied()).init_weight_transfer_engine({"packed": True})
    with pytest.raises(ConfigError, match="cannot receive weights by nccl or cuda_ipc"):
        HFReceiver(make_tied()).init_weight_transfer_engine({"master_address": "a", "rank_offset": 1})


def test_unknown_transport():
    with pytest.raises(ConfigError, match="'carrier_pigeon' is unknown; choose one of in_process, shared_memory"):
        make_sender("carrier_pigeon")


def test_nccl_ranks_follow_those_of_the_generators_before():
    infos = [shift_ranks({"rank_offset": 1, "world_size": 7}, index * 2) for index in range(3)]
    assert [info["rank_offset"] for info in infos] == [1, 3, 5]
    assert all(info["world_size"] == 7 for info in infos)
    assert shift_ranks({"packed": True}, 2) == {"packed": True}
