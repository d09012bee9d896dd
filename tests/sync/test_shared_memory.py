"""Segments: real processes, a full /dev/shm, leftovers of the dead, another host."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Listener

import pytest
import torch

from rlhf_ray.errors import SyncError
from rlhf_ray.models.pretrained import plain_state
from rlhf_ray.sync.factory import make_sender
from rlhf_ray.sync.receiver import HFReceiver
from rlhf_ray.sync.segment import GRACE_SECONDS, PREFIX, AttachedSegments, Segment, attach, remove_leftovers
from rlhf_ray.sync.shared_memory import check_same_memory

# A generator process: answers the four calls over a socket, and "checksum" with what it holds.
RECEIVER = """
import sys
from multiprocessing.connection import Client
import torch
from rlhf_ray.sync.receiver import HFReceiver

target = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Linear(70, 30))
receiver = HFReceiver(target)
with Client(sys.argv[1]) as line:
    while True:
        name, args = line.recv()
        if name == "stop":
            break
        if name == "checksum":
            line.send([float(p.detach().double().sum()) for p in target.parameters()] + [receiver.version])
        else:
            line.send(getattr(receiver, name)(*args))
"""


class SocketClient:
    def __init__(self, line) -> None:
        self.line = line

    def __getattr__(self, name):
        def call(*args):
            self.line.send((name, args))
            assert self.line.poll(30), f"no answer to {name}"
            return self.line.recv()

        return call


@pytest.mark.slow
def test_between_real_processes(tmp_path, repo_root):
    address = str(tmp_path / "line")
    with Listener(address) as listener:
        environment = {**os.environ, "PYTHONPATH": str(repo_root)}
        child = subprocess.Popen([sys.executable, "-c", RECEIVER, address], env=environment)
        listener._listener._socket.settimeout(60)
        client = SocketClient(listener.accept())
    folder = tmp_path / "shm"
    folder.mkdir()
    # 300 x 70 floats are 84 kB: larger than a bucket
    sender = make_sender("shared_memory", bucket_mb=0.01, directory=folder)
    try:
        for version in (1, 2, 3):
            torch.manual_seed(version)
            learner = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Linear(70, 30))
            stats = sender.send(lambda learner=learner: plain_state(learner), client, version)
            assert client.checksum() == [float(p.detach().double().sum()) for p in learner.parameters()] + [version]
            assert stats.buckets == 2  # the large weight, then all others
            # Both sides hold the memory, no name is left: killing either leaves nothing behind.
            assert not list(folder.iterdir())
        client.line.send(("stop", ()))
        assert child.wait(30) == 0
    finally:
        child.kill()
        sender.close()


class Forwarding:
    """A client that stays the same while the generator behind it is replaced."""

    def __init__(self, receiver):
        self.receiver = receiver

    def __getattr__(self, call):
        return getattr(self.receiver, call)


def test_new_generator_behind_the_same_client_needs_a_handshake(tmp_path, make_tied):
    """The segments have no names any more; the first try says so, and the second is whole again."""
    client = Forwarding(HFReceiver(make_tied(0)))
    sender = make_sender("shared_memory", bucket_mb=1, directory=tmp_path)
    sender.send(lambda: plain_state(make_tied(1)), client, 1)
    client.receiver = HFReceiver(make_tied(0))
    with pytest.raises(SyncError, match="newer than the learner's handshake, which WeightSender.reset repeats"):
        sender.send(lambda: plain_state(make_tied(2)), client, 2)
    client.receiver = HFReceiver(make_tied(0))
    sender.send(lambda: plain_state(make_tied(2)), client, 2)
    assert client.receiver.version == 2 and not list(tmp_path.iterdir())


def test_receiver_remembers_segments_in_use_and_forgets_old_ones(tmp_path):
    segments = [Segment(64, tmp_path) for _ in range(AttachedSegments.KEEP + 1)]
    attached = AttachedSegments()
    for segment in segments[:-1]:
        attached.flat(str(segment.path), 64)
    attached.flat(str(segments[0].path), 64)  # used again: now the second one is the oldest
    for segment in segments:
        if segment is not segments[-1]:
            segment.close()
    attached.flat(str(segments[-1].path), 64)
    attached.flat(str(segments[0].path), 64)
    with pytest.raises(SyncError):
        attached.flat(str(segments[1].path), 64)
    segments[-1].close()


def test_next_bucket_is_packed_while_the_last_is_loaded(tmp_path):
    """The source is asked for its third tensor although the first bucket is still being loaded."""
    asked_third = threading.Event()

    def pairs():
        yield "a", torch.full((16,), 1.0)  # one bucket each
        yield "b", torch.full((16,), 2.0)
        asked_third.set()
        yield "c", torch.full((16,), 3.0)

    class Slow:
        values: list[float] = []

        def update_weights(self, info):
            if info["index"] == 0:
                assert asked_third.wait(10)
            flat = attach(info["segment"], info["nbytes"])
            self.values.append(float(flat[:4].view(torch.float32)))

        def __getattr__(self, name):
            return lambda *_: None

    sender = make_sender("shared_memory", bucket_mb=64 / 2**20, directory=tmp_path)
    client = Slow()
    sender.send(pairs, client, 1)
    assert client.values == [1.0, 2.0, 3.0]
    sender.close()


def test_too_small_shared_memory(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SyncError, match=r"cannot reserve 8 MiB.*No space left.*MiB free.*--shm-size.*bucket_mb"):
        Segment(8 * 2**20, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sender_that_exits_or_crashes_leaves_nothing(tmp_path):
    code = (
        "from pathlib import Path; from rlhf_ray.sync.segment import Segment;"
        f"s = Segment(64, Path({str(tmp_path)!r})); print(s.path.exists()); raise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.strip() == "True"
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_process_are_removed_and_live_ones_kept(tmp_path):
    live = Segment(64, tmp_path)
    dead = tmp_path / f"{PREFIX}12345-dead"
    dead.write_bytes(b"x" * 64)
    fresh = tmp_path / f"{PREFIX}12345-fresh"
    fresh.write_bytes(b"x")
    old = time.time() - 2 * GRACE_SECONDS
    for path in (live.path, dead):
        os.utime(path, (old, old))
    assert remove_leftovers(tmp_path) == [dead]
    assert live.path.exists() and fresh.exists()
    live.close()
    assert not live.path.exists()


def test_segments_are_private(tmp_path):
    segment = Segment(64, tmp_path)
    assert segment.path.stat().st_mode & 0o777 == 0o600
    segment.close()


def test_receiver_on_another_host(tmp_path):
    with pytest.raises(SyncError, match="one host.*transport=nccl"):
        check_same_memory(str(tmp_path / "nowhere"), "00" * 16)
    other = tmp_path / "other"
    other.write_bytes(b"\0" * 16)  # the same path, other memory
    with pytest.raises(SyncError, match="not the learner's memory"):
        check_same_memory(str(other), "ab" * 16)


def test_short_segment_is_found(tmp_path):
    short = tmp_path / "short"
    short.write_bytes(b"\0" * 64)
    with pytest.raises(SyncError, match="holds 64 bytes where 128 were announced"):
        attach(str(short), 128)


def kept_sender(folder):
    """Two buckets of tied(): embed and body.weight, then body.bias."""
    return make_sender("shared_memory", bucket_mb=128 / 2**20, directory=folder, keep=True)


def same(receiver, module) -> bool:
    held = receiver._targets
    return all(torch.equal(held[name], value) for name, value in module.state_dict().items())


def test_what_was_sent_last_is_sent_again_to_one_that_missed_it(tmp_path, make_tied):
    sender, first = kept_sender(tmp_path), HFReceiver(make_tied(0))
    for version in (1, 2):
        assert sender.send(lambda v=version: plain_state(make_tied(v)), first, version).buckets > 1
        late = HFReceiver(make_tied(0))
        assert sender.send_again(late)
        assert late.version == version and same(late, make_tied(version))
    # The next goes to the one that it always went to, and again to any other.
    sender.send(lambda: plain_state(make_tied(3)), first, 3)
    assert same(first, make_tied(3)) and first.version == 3 and late.version == 2
    sender.send_again(late)
    assert same(late, make_tied(3)) and late.version == 3
    sender.close()


@pytest.mark.skipif(sys.platform != "linux", reason="there files without a name can be opened")
def test_what_is_kept_has_no_name(tmp_path, make_tied):
    sender = kept_sender(tmp_path)
    sender.send(lambda: plain_state(make_tied(1)), HFReceiver(make_tied(0)), 1)
    assert not list(tmp_path.iterdir())
    sender.close()


def test_before_the_first_sync_there_is_nothing_to_send_again(tmp_path, make_tied, recorder):
    sender = kept_sender(tmp_path)
    assert not sender.send_again(recorder)
    recorder.fail_at = 0
    with pytest.raises(SyncError, match="cable pulled"):
        sender.send(lambda: plain_state(make_tied(1)), recorder, 1)
    recorder.calls.clear()
    assert not sender.send_again(recorder) and recorder.order == [], "half of an update is none"
    sender.close()


def test_weights_that_are_sent_again_are_of_one_version(tmp_path, make_tied):
    """Whoever sends them again holds the sender's turn: an update of all waits for it."""
    sender, receiver = kept_sender(tmp_path), HFReceiver(make_tied(0))
    sender.send(lambda: plain_state(make_tied(1)), receiver, 1)
    with sender.turn:
        push = threading.Thread(target=lambda: sender.send(lambda: plain_state(make_tied(2)), receiver, 2))
        push.start()
        push.join(0.1)
        late = HFReceiver(make_tied(0))
        sender.send_again(late)
        assert late.version == 1 and same(late, make_tied(1)) and receiver.version == 1
    push.join(20)
    assert receiver.version == 2
    sender.close()


def test_another_file_at_the_path_of_a_known_one_is_mapped_anew(tmp_path):
    """Paths of nameless files are used again: the number of a closed one is given to the next."""
    attached = AttachedSegments()
    path = tmp_path / "segment"
    for byte in (1, 2):
        path.unlink(missing_ok=True)
        path.write_bytes(bytes([byte]) * 64)
        assert attached.flat(str(path), 64)[0] == byte
    path.unlink()
    assert attached.flat(str(path), 64)[0] == 2, "one that has lost its name is known still"
