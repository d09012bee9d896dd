"""What the ranks have put into a checkpoint, told where it was written: names, sizes and sha256 of their files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        layout: engine, ranks, ZeRO stage and dtype, for people and for whoever goes on from it.
    """

    files: Mapping[str, File]
    finite: bool
    layout: Mapping[str, Any] = field(default_factory=dict)


def written(
    folder: Path, paths: Iterable[Path], weights: Iterable[Tensor], layout: Mapping[str, Any] | None = None
) -> Written:
    """What this process has written: `paths` below `folder` are forced to disk and hashed."""
    paths = sorted(paths)
    for path in paths:
        force_to_disk(path)
    files = {path.relative_to(folder).as_posix(): file for path, file in zip(paths, files_of(paths), strict=True)}
    return Written(files, all_finite(weights), layout or {})


def together(parts: Iterable[Written]) -> Written:
    """What several ranks have written into one folder."""
    parts = list(parts)
    files = {name: file for part in parts for name, file in part.files.items()}
    return Written(files, all(part.finite for part in parts), parts[0].layout)


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
