"""Checkpoints that are written behind the next step: sealed when all have written, or never."""

from __future__ import annotations

import errno
import threading

import pytest
import torch

from rlhf_ray.errors import StorageError
from rlhf_ray.models.written import written
from rlhf_ray.run.checkpoint import Checkpoints
from rlhf_ray.run.saver import Saver


class Role:
    """Writes its number, when it is let."""

    def __init__(self, number=1):
        self.number, self.may_write = number, threading.Event()
        self.error = None

    def save(self, folder):
        self.begin_save(folder)
        return self.saved()

    def begin_save(self, folder):
        self.folder, self.copy = folder, self.number

    def is_saved(self):
        return self.may_write.is_set()

    def saved(self):
        if self.error:
            raise self.error
        self.folder.mkdir()
        (self.folder / "number").write_text(str(self.copy))
        return written(self.folder, [self.folder / "number"], [torch.ones(1)])


@pytest.fixture
def saver(tmp_path):
    return Saver(Checkpoints(tmp_path, keep=9))


def save(saver, step, roles, behind=True):
    fill = lambda folder: (folder / "note").write_text("kept")  # noqa: E731
    saver.save(step, roles, fill, {"kl": float(step)}, (), {}, behind=behind)


def test_it_is_a_checkpoint_when_all_roles_have_written_what_they_held_at_its_step(saver, tmp_path):
    roles = {"learner": Role(7), "critic": Role(8)}
    save(saver, 3, roles)
    for role in roles.values():
        role.number = 0  # the next step has changed it
    saver.look()
    assert saver.checkpoints.latest() is None and len(list(tmp_path.iterdir())) == 1
    roles["learner"].may_write.set()
    saver.look()
    assert saver.checkpoints.latest() is None, "the critic still writes"
    roles["critic"].may_write.set()
    saver.look()
    step, folder, state = saver.checkpoints.latest()
    assert (step, state, (folder / "note").read_text()) == (3, {"kl": 3.0}, "kept")
    assert [(folder / name / "number").read_text() for name in roles] == ["7", "8"]
    saver.look()
    saver.finish()
    assert saver.checkpoints.steps() == [3]


@pytest.mark.parametrize("behind", [True, False])
def test_the_next_one_waits_for_it(saver, behind):
    save(saver, 1, {"learner": Role()})
    save(saver, 2, {"learner": Role()}, behind)
    assert saver.checkpoints.steps() == ([1] if behind else [1, 2])
    saver.finish()
    assert saver.checkpoints.steps() == [1, 2]


def test_what_goes_wrong_meanwhile_is_said_and_leaves_nothing(saver, tmp_path):
    role = Role()
    save(saver, 1, {"learner": role}, behind=False)
    save(saver, 2, {"learner": role})
    role.error = OSError(errno.ENOSPC, "No space left on device")
    role.may_write.set()
    with pytest.raises(StorageError, match=r"checkpoint step_2 .*the disk is full; free some space"):
        saver.look()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]
    saver.finish()  # nothing is left to wait for


def test_what_lost_workers_have_begun_never_becomes_a_checkpoint(saver, tmp_path):
    save(saver, 1, {"learner": Role()})
    saver.drop()
    saver.finish()
    assert list(tmp_path.iterdir()) == []
    saver.drop()
