"""Whether a source is a file, a folder or a dataset of the Hub, and what is there instead where it is not.

A name that looks like a local file is never asked of the Hub: a typing mistake would become a network error, or
somebody else's data.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path

from rlhf_ray.config import shipped
from rlhf_ray.config.user_paths import is_folder, typed_path
from rlhf_ray.errors import DataError

HUB_PREFIX = "hf://datasets/"  # as fsspec writes it: for a Hub name that looks like a file
_SHOWN = 5
# A version (`-v0.2`) or a date is no suffix; names on the Hub have such.
_SUFFIX = re.compile(r"\.(?!v\d)[a-z][a-z0-9_]{1,11}$", re.IGNORECASE)
_ADVICE = {
    ".xlsx": "save the sheet as .csv (UTF-8)",
    ".xls": "save the sheet as .csv (UTF-8)",
    ".ods": "save the sheet as .csv (UTF-8)",
    ".zip": "unpack it, or pack the file with gzip",
    ".zst": "unpack it, or pack the file with gzip",
    ".bz2": "unpack it, or pack the file with gzip",
    ".xz": "unpack it, or pack the file with gzip",
    ".tar": "unpack it",
    ".tgz": "unpack it",
    ".gz": "the name must end in the packed file's own suffix and .gz, as rows.jsonl.gz",
}


def looks_local(source: str) -> bool:
    """Whether no Hub dataset has such a name, or something of that name is here. Nothing is opened."""
    path = typed_path(source)
    return (
        os.path.exists(path)  # Path.exists raises for a name that is too long
        or source.startswith((".", "/", "~", shipped.PREFIX))
        or source.endswith("/")
        or "\\" in source
        or source.partition(":")[0].count("/") > 1
        or _SUFFIX.search(source) is not None
        or (path.parent != Path(".") and is_folder(path.parent))
    )


def absent(source: str, path: Path, kinds: Collection[str]) -> DataError:
    """For a local path where nothing is: the names in its folder that are close, or else its data files."""
    folder = path.parent
    problem = f"{source}: no such file"
    if not is_folder(folder):
        return DataError(f"{problem}: there is no folder {folder}; check the path, which is relative to {Path.cwd()}")
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=_SHOWN, cutoff=0.6)
    data = [name for name in names if kind_of(Path(name), kinds)]
    if near:
        return DataError(f"{problem}; did you mean {' or '.join(str(folder / name) for name in near)}?")
    place = "here" if folder == Path(".") else f"in {folder}"
    there = f"{place} there are {_listed(data)}" if data else f"{place} there is no data file"
    return DataError(
        f"{problem}; {there}; give an existing path, or for a Hugging Face dataset {HUB_PREFIX}owner/name"
    )


def unreadable(source: str, path: Path, kinds: Collection[str]) -> DataError:
    """For a file whose suffix no reader has."""
    advice = _ADVICE.get(path.suffix.lower(), "write it as one of these, or rename it")
    return DataError(f"{source}: files of this kind are not read ({', '.join(kinds)} are); {advice}")


def kind_of(path: Path, kinds: Collection[str]) -> str | None:
    """The suffix, of two parts where it is packed (.jsonl.gz), if it is one of `kinds`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    for suffix in ("".join(suffixes), suffixes[-1] if suffixes else ""):
        if suffix in kinds:
            return suffix
    return None


def files_of_split(source: str, folder: Path, split: str, kinds: Collection[str]) -> list[Path]:
    """The data files of a split in a folder, or in its folder `data`: `train.jsonl`, or parts of it, in their order.

    As Hub repositories name them: `train-00000-of-00002.parquet`. Raises DataError where there are none, or where they
    are of several kinds, which nobody could tell from a set of copies.
    """
    for place in (folder, folder / "data"):
        files = sorted(entry for entry in place.iterdir() if kind_of(entry, kinds)) if place.is_dir() else []
        named = [file for file in files if re.match(rf"{re.escape(split)}(?![a-z])", file.name)]
        if len(found := {kind_of(file, kinds) for file in named}) > 1:
            raise DataError(
                f"{source}: for the split {split!r} the folder has {_listed([f.name for f in named])}, which are of "
                f"{len(found)} kinds; name one file"
            )
        if named:
            return named
        if files:
            raise DataError(
                f"{source}: a folder without a file for the split {split!r} ({split}.jsonl, {split}-*.parquet, ...); "
                f"it has {_listed([file.name for file in files])}: name one file"
            )
    raise DataError(f"{source}: a folder without data files ({', '.join(kinds)}); name a file, or another folder")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
