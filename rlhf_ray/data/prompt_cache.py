"""Prompts of a large file, tokenized and kept on disk for the next start: memory-mapped, never lists of Python ints.

A cache is named after all that its content follows from: the file's bytes, the tokenizer, the template and the
settings. It is written aside and renamed when it is whole; each file's digest is checked before it is used, and what
does not agree is made anew. It holds what JSON can say: rows with anything else are read each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import transformers
from huggingface_hub import constants as hub

from rlhf_ray.config.user_paths import is_file, typed_path
from rlhf_ray.data.chat import Chat, Instruction, Prompt
from rlhf_ray.data.token_rows import Made, TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # raise it where the same settings give other prompts
LARGE = 8 << 20  # bytes of a file from which on its prompts are kept: smaller ones are read in a second
META = "meta.json"
_TOKENS, _ENDS, _HIGHEST, _ROWS, _ROW_ENDS = "tokens.i32", "ends.i64", "highest.i32", "rows.jsonl", "row_ends.i64"
_KINDS = {_TOKENS: np.int32, _ENDS: np.int64, _HIGHEST: np.int32, _ROW_ENDS: np.int64, _ROWS: np.uint8}
_CHUNK = 1 << 20


class NotPlainError(Exception):
    """A row that JSON would not give back as it was."""


@dataclass(frozen=True)
class Place:
    """Where the prompts of a source are kept: `folder` holds caches, `key` is this one's name."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / self.key


@dataclass(frozen=True)
class Record:
    """What is kept of one prompt, beside its tokens."""

    prompt: str
    columns: dict[str, Any]
    where: str
    asked: Prompt
    answers: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Kept:
    """An opened cache. `about`: what its writer said of all rows."""

    tokens: TokenRows
    records: Made[Record]
    about: dict[str, Any]


def default_folder() -> Path:
    """Beside the caches of `datasets`, which follow $HF_DATASETS_CACHE, $HF_HOME and $XDG_CACHE_HOME."""
    datasets = os.environ.get("HF_DATASETS_CACHE")
    return (Path(datasets).expanduser() if datasets else Path(hub.HF_HOME) / "datasets") / "rlhf_ray_prompts"


def place_of(
    source: str, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any], folder: str | None
) -> Place | None:
    """None for what is not kept: a small file, no file, a slow tokenizer, `folder` none.

    A template that asks for the present moment gives other prompts at each one, which `clock` among the settings says;
    to the others it says nothing.
    """
    if folder == "none" or not getattr(tokenizer, "is_fast", False) or not isinstance(source, str):
        return None
    file = typed_path(source)
    if not is_file(file) or file.stat().st_size < LARGE:
        return None
    template = tokenizer.chat_template
    known = dict(settings)
    if "strftime_now" not in json.dumps(template):
        known.pop("clock", None)
    said = {
        "format": FORMAT, "versions": [transformers.__version__, tokenizers.__version__], "source": source,
        "bytes": digest_of(file), "tokenizer": type(tokenizer).__name__, "template": template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, "settings": known,
    }  # fmt: skip
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16)
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return Place(default_folder() if folder is None else typed_path(folder), digest.hexdigest())


def digest_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Writer:
    """Appends prompts to a cache that nobody sees before `finish`. Close it in any case."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._aside = place.folder / f"{place.key}.tmp-{uuid.uuid4().hex[:8]}"
        self._aside.mkdir(parents=True)
        self._files = {name: (self._aside / name).open("wb") for name in _KINDS}
        self._tokens = self._bytes = self.rows = 0

    def add(self, tokens: Sequence[Sequence[int]], records: Sequence[Record]) -> None:
        """Raises NotPlainError; the cache is of no use then."""
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        flat = np.fromiter((token for row in tokens for token in row), np.int32, int(lengths.sum()))
        ends = np.cumsum(lengths)
        texts = [_written(record) for record in records]
        row_ends = self._bytes + np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        for name, array in (
            (_TOKENS, flat), (_ENDS, ends + self._tokens),
            (_HIGHEST, np.maximum.reduceat(flat, ends - lengths)), (_ROW_ENDS, row_ends),
        ):  # fmt: skip
            self._files[name].write(array.astype(_KINDS[name]).tobytes())
        self._files[_ROWS].writelines(texts)
        self._tokens, self._bytes, self.rows = self._tokens + len(flat), int(row_ends[-1]), self.rows + len(records)

    def finish(self, about: Mapping[str, Any]) -> None:
        """All rows are there. Raises NotPlainError, OSError."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        _require_plain(about)
        digests = {name: digest_of(self._aside / name) for name in _KINDS}
        text = json.dumps({"format": FORMAT, "rows": self.rows, "digests": digests, "about": about})
        with (self._aside / META).open("w", encoding="utf-8") as meta:
            meta.write(text)
            meta.flush()
            os.fsync(meta.fileno())
        with contextlib.suppress(OSError):
            self._aside.rename(self._place.path)
            return
        # There is one already. Of another process that was faster it stays: the rows are the same, and that process
        # reads them where they lie; over NFS, deleting its files would end it.
        if opened(self._place) is None:
            shutil.rmtree(self._place.path, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._aside.rename(self._place.path)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._aside, ignore_errors=True)


def opened(place: Place) -> Kept | None:
    """None where there is none, or a spoilt one."""
    try:
        meta = json.loads((place.path / META).read_text(encoding="utf-8"))
        if any(digest_of(place.path / name) != meta["digests"][name] for name in _KINDS):
            return None
        arrays = {name: _mapped(place.path / name, kind) for name, kind in _KINDS.items()}
        about = dict(meta["about"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Small ones are read whole; of the others only the pages that somebody asks for are.
    ends, highest, row_ends = (np.array(arrays[name]) for name in (_ENDS, _HIGHEST, _ROW_ENDS))
    rows = arrays[_ROWS]

    def record(index: int) -> Record:
        start = int(row_ends[index - 1]) if index else 0
        return _read(rows[start : int(row_ends[index])].tobytes())

    return Kept(TokenRows(arrays[_TOKENS], ends, highest), Made(record, range(len(row_ends))), about)


def _mapped(file: Path, kind: type) -> np.ndarray:
    return np.memmap(file, kind, "r")


def _written(record: Record) -> bytes:
    answers = [list(answer) for answer in record.answers]
    said = [record.prompt, record.columns, record.where, _as_tree(record.asked), answers]
    _require_plain(said)
    return json.dumps(said, separators=(",", ":")).encode() + b"\n"


def _read(text: bytes) -> Record:
    prompt, columns, where, asked, answers = json.loads(text)
    return Record(prompt, columns, where, _from_tree(asked), tuple(map(tuple, answers)))


def _as_tree(prompt: Prompt) -> Any:
    if isinstance(prompt, Instruction):
        return {"instruction": prompt.instruction, "input": prompt.input}
    if isinstance(prompt, Chat):
        return [list(prompt.messages), list(prompt.tools), prompt.template_args]
    return prompt


def _from_tree(tree: Any) -> Any:
    if isinstance(tree, dict):
        return Instruction(**tree)
    if isinstance(tree, list):
        return Chat(tuple(tree[0]), tuple(tree[1]), tree[2])
    return tree


def _require_plain(value: Any) -> None:
    """Whether JSON gives it back as it is: no tuples, no keys but texts, no types of its own."""
    kind = type(value)
    if kind is dict and all(type(key) is str for key in value):
        for inner in value.values():
            _require_plain(inner)
    elif kind is list:
        for inner in value:
            _require_plain(inner)
    elif value is not None and kind not in (str, int, float, bool):
        raise NotPlainError(kind.__name__)
