import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlhf_ray.errors import StorageError
from rlhf_ray.run import storage
from rlhf_ray.run.storage import (
    append_line,
    explained,
    keep_lines,
    read_lines,
    to_json,
    write_atomically,
    written_whole,
)


def test_values_that_json_does_not_know():
    text = to_json({"a": math.nan, "b": -math.inf, "c": torch.tensor(2.5), "d": np.int64(3), "e": {1: (True, None)}})
    assert text == '{"a": "NaN", "b": "-Infinity", "c": 2.5, "d": 3, "e": {"1": [true, null]}}'
    assert math.isnan(float(json.loads(text)["a"])) and float(json.loads(text)["b"]) == -math.inf


def test_a_line_cut_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_line(path, {"step": 1})
    append_line(path, {"step": 2})
    with open(path, "a") as file:
        file.write('{"step": 3, "rew')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_multibyte_letter_cut_in_half(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "ä"}\n{"text": "ä'.encode()[:-1])
    assert read_lines(path) == [{"text": "ä"}]
    assert keep_lines(path, lambda row: True) == 1
    assert path.read_text(encoding="utf-8") == '{"text": "ä"}\n'


def test_a_line_glued_to_a_cut_one_costs_only_that_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"ste{"step": 2}\n{"step": 3}\n')
    assert read_lines(path) == [{"step": 1}, {"step": 3}]


def test_atomic_write_replaces_and_leaves_no_other_file(tmp_path):
    write_atomically(tmp_path / "a.json", "old")
    write_atomically(tmp_path / "a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "new"


def test_a_failed_atomic_write_keeps_the_old_text(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.json: cannot write a\.json: the disk is full; free some space"):
        write_atomically(tmp_path / "a.json", "new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is a device of Linux")
def test_a_device_that_is_really_full():
    with pytest.raises(StorageError, match="the disk is full"):
        append_line(storage.Path("/dev/full"), {"step": 1})


@pytest.mark.parametrize("error", [
    RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EROFS, "Read-only file system"),
])  # fmt: skip
def test_errors_of_the_disk_say_what_to_do(tmp_path, error):
    with pytest.raises(StorageError, match=r"cannot write a test: .*(--run-dir)"), explained("a test", tmp_path):
        raise error


def test_a_folder_that_exists_is_whole(tmp_path):
    folder = tmp_path / "model"
    (tmp_path / "model.unfinished").mkdir()
    (tmp_path / "model.unfinished" / "half").touch()  # of a process that was killed
    for text in ("old", "new"):
        with written_whole("a model", folder) as unfinished:
            (unfinished / "weights").write_text(text)
    with pytest.raises(RuntimeError), written_whole("a model", folder) as unfinished:
        (unfinished / "weights").touch()
        raise RuntimeError("killed")
    with pytest.raises(StorageError, match="a disk that this machine does not see"), written_whole("a model", folder):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "weights"]
    assert (folder / "weights").read_text() == "new"


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The name survives a power cut at once, bytes that nobody forced to disk do not."""
    on_disk = []
    note = lambda path: on_disk.append((path.name, (tmp_path / "model").exists()))  # noqa: E731
    monkeypatch.setattr(storage, "force_to_disk", note)
    with written_whole("a model", tmp_path / "model") as unfinished:
        (unfinished / "part").mkdir()
        (unfinished / "part" / "weights").write_text("some")
    named = (tmp_path.name, True)
    assert on_disk == [("part", False), ("weights", False), ("model.unfinished", False), named]


def test_torch_hides_a_full_disk_so_the_disk_is_asked(tmp_path, monkeypatch):
    usage = storage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(StorageError, match="the disk is full"), explained("a test", tmp_path / "not" / "there"):
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ZeroDivisionError), explained("a test", tmp_path):
        raise ZeroDivisionError


def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "summary.json"
    write_atomically(path, "0" * 50_000)
    code = (
        "import sys\nfrom pathlib import Path\nfrom rlhf_ray.run.storage import write_atomically\n"
        "print('go', flush=True)\n"
        "i = 0\nwhile True:\n    i += 1; write_atomically(Path(sys.argv[1]), str(i % 10) * 50_000)\n"
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        child.stdout.readline()
        child.kill()
        child.wait()
        text = path.read_text()
        assert len(text) == 50_000 and len(set(text)) == 1
