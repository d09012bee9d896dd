"""Writing to disk so that a reader never meets half a file, and so that a full disk explains itself."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.errors import RlhfRayError, StorageError
from rlhf_ray.models.written import force_to_disk

SEAL = "sha256"
_REMEDY = {
    errno.ENOSPC: "the disk is full; free some space or set --run-dir to another disk, then --resume auto",
    errno.EDQUOT: "the disk quota is used up; free some space or set --run-dir elsewhere, then --resume auto",
    errno.EROFS: "the file system is read-only; set --run-dir to a place you may write to",
    errno.EACCES: "no permission to write there; set --run-dir to a place you may write to",
    errno.ENAMETOOLONG: "the path is too long; set a shorter name or --run-dir",
}


def _out_of_space(error: BaseException, path: Path) -> bool:
    # torch.save and safetensors turn ENOSPC into errors of their own, so read the text and ask the disk too.
    if "No space left" in str(error) or "os error 28" in str(error):
        return True
    nearest = next(p for p in [path, *path.parents] if p.exists())
    return shutil.disk_usage(nearest).free < 1 << 20


@contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn the errors of a disk that will not take our bytes into a StorageError that says what to do.

    Raises:
        StorageError: no space, quota, permission or read-only; anything else passes through unchanged.
    """
    try:
        yield
    except RlhfRayError:
        raise  # it says already what to do
    except Exception as error:
        code = getattr(error, "errno", None)
        if code not in _REMEDY and _out_of_space(error, path):
            code = errno.ENOSPC
        if code in _REMEDY:
            raise StorageError(f"{path}: cannot write {what}: {_REMEDY[code]}") from error
        raise


@contextmanager
def written_whole(what: str, folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` at the end: one of that name is always complete,
    after a kill and after a power cut.

    Raises:
        StorageError: as `explained`; and where nothing was written, for then the writer sees another disk.
    """
    unfinished, old = (folder.with_name(f"{folder.name}.{state}") for state in ("unfinished", "old"))
    try:
        with explained(what, folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()  # here, though another machine may fill it: over NFS, its own would be seen late
            yield unfinished
            if not any(unfinished.iterdir()):
                raise StorageError(
                    f"{folder}: {what} was written to a disk that this machine does not see; set --run-dir to a "
                    "place that all machines of the run see"
                )
            fsync_tree(unfinished)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            unfinished.rename(folder)
            force_to_disk(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs these bytes back


def fsync_tree(folder: Path) -> list[Path]:
    """Force a folder and everything below it to disk; returns what lies below, sorted."""
    paths = sorted(folder.rglob("*"))
    for path in [*paths, folder]:
        force_to_disk(path)
    return paths


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: after a crash at any moment it holds the old text or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with explained(path.name, path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        force_to_disk(path.parent)


def to_json(value: Any, **options: Any) -> str:
    """Strict JSON. NaN and infinities become the strings that float() and JavaScript's Number() read back."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False, **options)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where the file is missing or holds none: empty, cut, garbage, something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, as JSON holds it, and the sha256 of that: whatever becomes another afterwards does not fit it."""
    plain = _plain(value)
    return {**plain, SEAL: _seal_of(plain)}


def opened(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was `sealed`; None where something in it is another now, or where nobody has sealed it."""
    plain = {name: part for name, part in value.items() if name != SEAL}
    return plain if value.get(SEAL) == _seal_of(plain) else None


def _seal_of(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line with a single write, so that a crash can only cut the last line."""
    with explained(path.name, path), open(path, "a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a JSONL file written by `append_line`; a cut last line is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was never finished
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a cut line that an older process appended to
        if isinstance(row, dict):
            rows.append(row)
    return rows


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a JSONL file with the whole rows that `keep` accepts; returns how many rows went."""
    if not path.exists():
        return 0
    before = path.read_text(encoding="utf-8", errors="replace")
    rows = [row for row in read_lines(path) if keep(row)]
    after = "".join(to_json(row) + "\n" for row in rows)
    if after != before:
        write_atomically(path, after)
    lines = before.split("\n")
    return len(lines) - (not lines[-1]) - len(rows)
