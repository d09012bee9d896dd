"""Rows of tables: parquet and Arrow files, folders of `datasets.save_to_disk`, datasets of the Hub; rows from Python.

A table has every column and every field of a struct in every row, and None where a row has nothing: a tool call with
the arguments `{"harbour": "Bergen"}` comes back with the arguments of all other tools beside it. `without_padding`
(data/values.py) takes these away, so that the same rows are the same from `.jsonl` and from `.parquet`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_ray.config.given import GivenRows
from rlhf_ray.data.text_files import Found
from rlhf_ray.data.values import without_padding
from rlhf_ray.errors import DataError

_DATASET_FILES = ("dataset_info.json", "state.json")
_SPLITS_FILE = "dataset_dict.json"


def parquet_rows(path: Path) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from _numbered(path, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from error


def arrow_rows(path: Path) -> Iterator[Found]:
    """Of either Arrow format: the stream, which `datasets` writes, or the file (Feather)."""
    import pyarrow

    try:
        with pyarrow.OSFile(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = iter(pyarrow.ipc.open_stream(source))
            yield from _numbered(path, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error}); write it again") from error


def _numbered(path: Path, batches: Iterator[Any]) -> Iterator[Found]:
    number = 0
    for batch in batches:
        # Readers trust what they find: in a damaged file, texts would be whatever lies in memory at a wrong place.
        batch.validate(full=True)
        for fields in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", without_padding(fields)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the library `datasets` has written this folder."""
    return (folder / _SPLITS_FILE).is_file() or all((folder / name).is_file() for name in _DATASET_FILES)


def saved_rows(folder: Path, split: str) -> Iterator[Found]:
    """Rows of a saved Dataset, or of one split of a saved DatasetDict; `where` has the index, as `dataset[17]`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes Arrow, JSON or the file system say
        raise DataError(
            f"{folder}: cannot load this folder of save_to_disk ({type(error).__name__}: {error}); save it again"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{folder}: it has no split {split!r}; it has {', '.join(map(repr, found)) or 'none'}")
        found, folder = found[split], folder / split
    return _indexed(str(folder), found)


def hub_rows(name: str, split: str) -> Iterator[Found]:
    """Rows of `owner/name` or `owner/name:subset`; `where` has the index, as `dataset[17]`."""
    from datasets import load_dataset

    repository, _, subset = name.partition(":")
    try:
        dataset = load_dataset(repository, subset or None, split=split)
    except Exception as error:  # load_dataset raises a dozen kinds, from network to schema errors
        raise DataError(
            f"{name}: cannot load this Hugging Face dataset, split {split!r} ({type(error).__name__}: {error}); "
            "check the name (owner/name, or owner/name:subset), the split and the network, or give a local file"
        ) from error
    return _indexed(name, dataset)


def given_rows(rows: GivenRows, split: str) -> Iterator[Found]:
    """Rows of a Python program; `where` has the index, as `rows[17]`. Those of a list are taken as they are."""
    try:
        found = rows.of_split(split)
    except KeyError:
        there = ", ".join(map(repr, rows.value))
        raise DataError(f"{rows}: given by split, and there is no {split!r} among {there}; set `split`") from None
    is_table = not isinstance(found, list | tuple)
    for index, fields in enumerate(found):
        where = f"rows[{index}]"
        if isinstance(fields, Mapping):
            yield where, without_padding(dict(fields)) if is_table else dict(fields)
        else:
            yield DataError(f"{where}: a {type(fields).__name__}, not a mapping; give each row as a dict")


def _indexed(name: str, dataset: Any) -> Iterator[Found]:
    for column, feature in dict(getattr(dataset, "features", None) or {}).items():
        # Decoding an image opens whatever path or URL its row names, /etc/passwd or a machine of the own network.
        if (plain := _undecoded(feature)) != feature:
            dataset = dataset.cast_column(column, plain)
    for index, fields in enumerate(dataset):
        yield f"{name}:{index}", without_padding(dict(fields))


def _undecoded(feature: Any) -> Any:
    """A column's type, in which images, sound and films stay bytes and paths."""
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if getattr(feature, "decode", False) is True:
        return replace(feature, decode=False)
    if (inner := getattr(feature, "feature", None)) is not None:
        return replace(feature, feature=_undecoded(inner))
    return feature
