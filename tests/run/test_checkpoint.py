"""What is promised: after a crash at any moment, the newest whole checkpoint loads, and a damaged one is told of."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from rlhf_ray.errors import CheckpointError, ConfigError, DivergenceError, StorageError
from rlhf_ray.models.written import written
from rlhf_ray.run import checkpoint
from rlhf_ray.run.checkpoint import Checkpoints, Ranking
from rlhf_ray.run.storage import opened, sealed


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


def reseal(folder, **changes):
    """The manifest as somebody would write it who can compute its sha256."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(sealed(opened(manifest) | changes)))


def edit(old, new):
    def damage(folder):
        path = folder / "manifest.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


@pytest.mark.parametrize(("damage", "reason"), [
    (edit('"step": 3', '"step": 2'), "manifest.json is damaged"),  # one flipped bit
    (edit('"files": {', '"files": {}, "none": {'), "manifest.json is damaged"),
    (edit('"sha256"', '"sha257"'), "manifest.json is damaged"),
    (lambda folder: reseal(folder, step=2), "manifest.json is of step 2; the folder has another's name"),
    (lambda folder: reseal(folder, files={}), "manifest.json does not name state.pt, without which nothing can be"),
    (lambda folder: reseal(folder, files={"state.pt": {"size": 1, "sha256": ""}, "../x": {"size": 1, "sha256": ""}}),
     "state.pt has "),
    (lambda folder: (folder / "learner" / "rank_9.pt").touch(), "learner/rank_9.pt is no part of it; move it away"),
])  # fmt: skip
def test_the_manifest_covers_itself_and_what_must_be_there(saved, events, damage, reason):
    damage(saved.folder / "step_3")
    with pytest.warns(UserWarning, match="falling back to the one before it"):
        assert saved.latest()[0] == 2
    assert [kind for kind, _ in events] == ["checkpoint_damaged"] and reason in events[0][1]["reason"]


def test_a_name_that_leads_out_of_a_checkpoint_is_refused(saved):
    folder = saved.folder / "step_3"
    state = json.loads((folder / "manifest.json").read_text())["files"]["state.pt"]
    reseal(folder, files={"state.pt": state, "../latest": {"size": 7, "sha256": ""}})
    with pytest.raises(CheckpointError, match=r"names \.\./latest, which lies outside"):
        saved.load(folder)


def told(folder, text="shard", finite=True):
    """What a rank says that it has written, and has."""
    folder.mkdir()
    (folder / "shard.pt").write_text(text)
    return written(folder, [folder / "shard.pt"], [torch.tensor([1.0 if finite else float("nan")])])


def test_the_manifest_has_the_hashes_of_those_who_wrote(tmp_path):
    def write(folder):
        said = told(folder / "learner")
        (folder / "learner" / "shard.pt").write_text("SHARD")  # the disk has lost a bit in between
        return {"learner": said, "critic": None}

    folder = Checkpoints(tmp_path).save(1, write, {})
    with pytest.raises(CheckpointError, match="learner/shard.pt is not what was written"):
        Checkpoints(tmp_path).load(folder)


def test_a_rank_that_writes_to_another_disk_fails_the_save(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "PATIENCE_S", 0.0)

    def write(folder):
        said = told(folder / "learner")
        (folder / "learner" / "shard.pt").unlink()  # it lies on the other machine alone
        return {"learner": said}

    with pytest.raises(ConfigError, match=r"learner/shard.pt: a rank has written 5 bytes .* not on a disk that all"):
        saved.save(4, write, {})
    assert sorted(p.name for p in saved.folder.iterdir()) == ["latest", "step_2", "step_3"]


def test_weights_that_are_not_finite_are_not_kept_and_push_nothing_out(saved):
    with pytest.raises(DivergenceError, match="weights of the critic .*; the checkpoint of step 3 has the last that"):
        saved.save(4, lambda f: {"learner": told(f / "learner"), "critic": told(f / "critic", finite=False)}, {})
    assert saved.steps() == [2, 3] and saved.latest()[0] == 3


def test_the_best_stay_beside_the_newest(tmp_path):
    for better, kept in ((True, [2, 4, 6]), (False, [1, 5, 6])):
        checkpoints = Checkpoints(tmp_path / str(better), keep=1, ranking=Ranking("reward", 2, higher=better))
        for step, reward in enumerate((0.1, 0.9, math.nan, 0.9, 0.2, None), start=1):
            checkpoints.save(step, weights("w"), {}, metrics={} if reward is None else {"reward": reward})
        assert checkpoints.steps() == kept


def test_a_small_file_comes_from_the_newest_checkpoint_that_has_it_whole(saved):
    def write(folder):
        (folder / "note.json").write_text(json.dumps({"step": step}))

    for step in (4, 5):
        saved.save(step, write, {})
    assert saved.small_file("note.json") == {"step": 5}
    (saved.folder / "step_5" / "note.json").write_text('{"step": 9}')
    assert saved.small_file("note.json") == {"step": 4} and saved.small_file("other.json") == {}


@pytest.mark.parametrize("number", [2, 4])
def test_a_format_of_another_version(saved, number):
    path = saved.folder / "step_3" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 3', f'"format": {number}'))
    with pytest.raises(CheckpointError, match=f"format {number}, and this version reads 3"):
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
def write(folder):
    (folder / "weights").write_bytes(bytes([step % 256]) * 300_000)

while True:
    step += 1
    checkpoints.save(step, write, {"step": step})
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
