"""What the ranks have put into a checkpoint, told where it was written: names, sizes and sha256 of their files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class File:
    size: int
    sha256: str


@dataclass(frozen=True)
class Written:
    """Of all ranks.

    Attributes:
        files: by their names inside the folder that was written, with `/` between the parts.
        finite: whether all weights are; a policy that is not cannot be gone on with.
    """

    files: Mapping[str, File]
    finite: bool


def written(folder: Path, paths: Iterable[Path], weights: Iterable[Tensor]) -> Written:
    """What this process has written: `paths` below `folder` are forced to disk and hashed."""
    paths = sorted(paths)
    for path in paths:
        force_to_disk(path)
    files = {path.relative_to(folder).as_posix(): file for path, file in zip(paths, files_of(paths), strict=True)}
    return Written(files, all_finite(weights))


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """What a rank has written, by DeepSpeed's names; what no rank's number is in is rank 0's."""
    found = {path: re.search(r"zero_pp_rank_(\d+)_", path.name) for path in folder.rglob("*") if path.is_file()}
    return [path for path, name in found.items() if int(name[1] if name else 0) == rank]


def together(parts: Iterable[Written]) -> Written:
    """What several ranks have written into one folder."""
    parts = list(parts)
    files = {name: file for part in parts for name, file in part.files.items()}
    return Written(files, all(part.finite for part in parts))


def all_finite(weights: Iterable[Tensor]) -> bool:
    """Packed weights (QLoRA) are whole numbers, hence finite."""
    return all(bool(tensor.isfinite().all()) for tensor in weights if tensor.is_floating_point())


def files_of(paths: Iterable[Path]) -> list[File]:
    """Size and sha256 of each."""
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        return list(pool.map(_file, paths))


def _file(path: Path) -> File:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return File(path.stat().st_size, digest.hexdigest())


def force_to_disk(path: Path) -> None:
    """A file or folder, whichever process wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
