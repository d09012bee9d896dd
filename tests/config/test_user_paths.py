from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config.user_paths import is_file, is_folder, typed_path


def test_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/a/b")
    assert typed_path("~/c") == Path("/a/b/c") and typed_path("d/~") == Path("d/~")
    assert typed_path("~nobody-has-this-name/c") == Path("~nobody-has-this-name/c")


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b", "", "x/" * 3000])
def test_a_name_that_no_file_system_takes(name):
    assert not is_file(Path(name)) and (name == "" or not is_folder(Path(name)))  # "" is the folder where we are


def test_what_is_there(tmp_path):
    (tmp_path / "file").write_text("x")
    assert is_folder(tmp_path) and not is_file(tmp_path)
    assert is_file(tmp_path / "file") and not is_folder(tmp_path / "file")
