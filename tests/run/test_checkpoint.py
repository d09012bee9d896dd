"""What is promised: after a crash at any moment, the newest whole checkpoint loads, and a damaged one is told of."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from rlhf_ray.errors import CheckpointError, StorageError
from rlhf_ray.run import checkpoint
from rlhf_ray.run.checkpoint import Checkpoints


def weights(text):
    def write(folder):
        (folder / "learner").mkdir()
        (folder / "learner" / "rank_0.pt").write_text(text)
        (folder / "rank_1.pt").write_text(text * 2)

    return write


@pytest.fixture
def events():
    return []


@pytest.fixture
def saved(tmp_path, events):
    """Steps 1, 2, 3 of which 2 and 3 are kept."""
    on_event = lambda kind, fields: events.append((kind, fields))  # noqa: E731
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, on_event=on_event)
    for step in (1, 2, 3):
        checkpoints.save(step, weights(f"step {step}"), {"step": step})
    return checkpoints


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path / "none").latest() is None


def test_the_newest_is_loaded_and_older_ones_are_pruned(saved, events):
    step, folder, state = saved.latest()
    assert (step, state) == (3, {"step": 3})
    assert (folder / "learner" / "rank_0.pt").read_text() == "step 3"
    assert sorted(p.name for p in saved.folder.iterdir()) == ["latest", "step_2", "step_3"]
    assert saved.steps() == [2, 3] and events == []


def test_the_manifest_lists_size_and_sha256_of_every_file(saved):
    manifest = json.loads((saved.folder / "step_3" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["learner/rank_0.pt", "rank_1.pt", "state.pt"]
    assert manifest["files"]["rank_1.pt"]["size"] == 12
    assert manifest["files"]["learner/rank_0.pt"]["sha256"] == hashlib.sha256(b"step 3").hexdigest()


def test_every_kind_of_random_state_comes_back_equal(tmp_path):
    import random

    random.seed(1)
    numbers = np.random.default_rng(1)  # PCG64: 128-bit integers
    state = {
        "torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numbers.bit_generator.state,
        "numpy_legacy": np.random.RandomState(3).get_state(), "scalar": np.float64(0.1),
        "buffer": {"tokens": torch.arange(6).view(2, 3), "columns": ({"prompt": "2+2="}, {"prompt": "é"})},
        "kl": {"coef": 0.05}, "position": 12, "none": None,
    }  # fmt: skip
    Checkpoints(tmp_path).save(1, lambda folder: None, state)
    _, _, back = Checkpoints(tmp_path).latest()
    assert torch.equal(back["torch"], state["torch"])
    assert back["python"] == state["python"] and back["numpy"] == state["numpy"]
    assert (back["numpy_legacy"][1] == state["numpy_legacy"][1]).all() and back["scalar"] == 0.1
    assert torch.equal(back["buffer"]["tokens"], state["buffer"]["tokens"])
    assert back["buffer"]["columns"] == state["buffer"]["columns"]
    assert (back["kl"], back["position"], back["none"]) == ({"coef": 0.05}, 12, None)


class Thing:
    pass


def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_saved(saved):
    with pytest.raises(CheckpointError, match="keep numbers, text, lists, dicts, tensors"):
        saved.save(4, lambda folder: None, {"thing": Thing()})
    assert saved.latest()[0] == 3
    assert not list(saved.folder.glob("*.tmp-*"))


def flip_a_byte(folder):
    path = folder / "rank_1.pt"
    path.write_bytes(b"X" + path.read_bytes()[1:])


@pytest.mark.parametrize(("damage", "reason"), [
    (flip_a_byte, "rank_1.pt is not what was written (its sha256 differs)"),
    (lambda folder: (folder / "rank_1.pt").write_text("short"), "rank_1.pt has 5 bytes, and 12 were written"),
    (lambda folder: (folder / "learner" / "rank_0.pt").unlink(), "learner/rank_0.pt is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json, so it was never finished"),
    (lambda folder: (folder / "manifest.json").write_text('{"files"'), "manifest.json is damaged"),
    (lambda folder: (folder / "state.pt").unlink(), "state.pt is missing"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_taken(saved, events, damage, reason):
    damage(saved.folder / "step_3")
    with pytest.warns(UserWarning, match="falling back to the one before it"):
        step, _, state = saved.latest()
    assert (step, state) == (2, {"step": 2})
    (kind, fields), = events
    assert kind == "checkpoint_damaged" and fields["checkpoint"] == "step_3" and reason in fields["reason"]


def test_all_damaged_is_an_error_not_a_fresh_start(saved):
    for step in (2, 3):
        flip_a_byte(saved.folder / f"step_{step}")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"none of 2 checkpoints is whole.*step_2"):
        saved.latest()


def test_a_format_of_the_future(saved):
    path = saved.folder / "step_3" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format 2, and this version reads 1"):
        saved.load(path.parent)


def test_going_on_from_an_older_checkpoint_leaves_the_abandoned_steps_behind(saved, events):
    (saved.folder / "latest").write_text("step_2\n")  # what a person does to go back
    assert saved.latest()[0] == 2
    saved.keep = 5
    saved.save(3, weights("again"), {"step": 33})  # the same step once more: replaces
    assert saved.latest()[2] == {"step": 33} and events == []
    (saved.folder / "latest").write_text("step_2\n")
    saved.save(2, weights("again"), {"step": 22})
    assert sorted(p.name for p in saved.folder.iterdir()) == ["latest", "step_2"]
    assert events == [("checkpoints_abandoned", {"checkpoints": ["step_3"], "step": 2})]


def test_a_crash_between_the_two_renames_of_a_replaced_step_loses_nothing(saved, monkeypatch):
    real = os.rename

    def die_on_the_second(source, target):
        if ".tmp-" in str(source):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", die_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        saved.save(3, weights("again"), {"step": 33})
    monkeypatch.undo()
    assert saved.latest()[2] == {"step": 3}


def test_a_crash_before_latest_is_replaced(saved, monkeypatch):
    def die_at_latest(path, text):
        if path.name == "latest":
            raise KeyboardInterrupt
        path.write_text(text)

    monkeypatch.setattr(checkpoint, "write_atomically", die_at_latest)
    with pytest.raises(KeyboardInterrupt):
        saved.save(4, weights("4"), {"step": 4})
    monkeypatch.undo()
    assert saved.latest()[0] == 3, "`latest` still names it"
    (saved.folder / "latest").unlink()
    assert saved.latest()[0] == 4, "and step_4 is whole"


def test_a_full_disk_frees_what_it_began_and_says_so(saved):
    def full(folder):
        (folder / "big").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"checkpoint step_4 \(the ones before it are untouched\): the disk is full"):
        saved.save(4, full, {})
    assert sorted(p.name for p in saved.folder.iterdir()) == ["latest", "step_2", "step_3"]
    assert saved.latest()[0] == 3


def test_an_error_of_the_writer_passes_and_nothing_is_left(saved):
    def broken(folder):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        saved.save(4, broken, {})
    assert saved.steps() == [2, 3] and not list(saved.folder.glob("*.tmp-*"))


def test_keep_must_leave_one(tmp_path):
    with pytest.raises(CheckpointError, match="set keep >= 1"):
        Checkpoints(tmp_path, keep=0)


def test_files_of_other_processes_are_in_the_manifest(tmp_path):
    """Learner ranks write their shards themselves into the folder they are told."""

    def write(folder):
        code = "import sys; open(sys.argv[1] + '/shard_' + sys.argv[2], 'w').write('shard ' + sys.argv[2])"
        ranks = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(rank)]) for rank in range(3)]
        assert [rank.wait() for rank in ranks] == [0, 0, 0]

    folder = Checkpoints(tmp_path).save(1, write, {})
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) == ["shard_0", "shard_1", "shard_2", "state.pt"]
    assert Checkpoints(tmp_path).latest()[0] == 1


SAVER = """
import sys, time
from pathlib import Path
from rlhf_ray.run.checkpoint import Checkpoints

def write(folder):
    with open(folder / "weights", "wb") as file:
        file.write(b"a" * 1000)
        file.flush()
        print("half", flush=True)
        time.sleep(60)

Checkpoints(Path(sys.argv[1])).save(4, write, {"step": 4})
"""


def test_sigkill_in_the_middle_of_a_save(saved):
    child = subprocess.Popen([sys.executable, "-c", SAVER, str(saved.folder)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(list(saved.folder.glob("step_4.tmp-*"))) == 1, "the test killed it too late"
    assert saved.latest()[0] == 3
    saved.save(4, weights("4"), {"step": 4})
    assert not list(saved.folder.glob("*.tmp-*")), "and the next save clears the remains"


LOOP = """
import sys
from pathlib import Path
from rlhf_ray.run.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
found = checkpoints.latest()
step = found[0] if found else 0
if found:
    assert found[2] == {"step": step}
    assert (found[1] / "weights").read_bytes() == bytes([step % 256]) * 300_000
print("resumed", step, flush=True)
while True:
    step += 1
    checkpoints.save(step, lambda f: (f / "weights").write_bytes(bytes([step % 256]) * 300_000), {"step": step})
"""


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment_it_always_goes_on(tmp_path):
    resumed = []
    for attempt in range(6):
        child = subprocess.Popen([sys.executable, "-W", "error", "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE)
        resumed.append(int(child.stdout.readline().split()[1]))
        # Let it save at least once more before it dies.
        while not (saves := Checkpoints(tmp_path).steps()) or saves[-1] <= resumed[-1]:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(0.013 * attempt)
        child.kill()
        child.wait()
    assert resumed == sorted(resumed) and resumed[-1] > 0
    assert Checkpoints(tmp_path).latest()[0] >= resumed[-1]
