"""Paths as people type them: whatever stands there, asking whether something is there never fails."""

from __future__ import annotations

import os
from pathlib import Path


def typed_path(text: str | Path) -> Path:
    """With `~` as the home directory; that of a user who does not exist stays as it is (pathlib raises for it)."""
    return Path(os.path.expanduser(text))


def is_folder(path: Path) -> bool:
    """Also False for a name that no file system takes, too long or with a NUL byte: `Path.is_dir` raises for it."""
    return os.path.isdir(path)


def is_file(path: Path) -> bool:
    """See is_folder."""
    return os.path.isfile(path)
