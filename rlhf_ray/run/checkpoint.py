"""Checkpoints that are whole or not there.

    step_N.tmp-*  written and fsynced  ->  manifest.json last  ->  renamed to step_N  ->  `latest` replaced
    ->  older ones pruned

A crash at any point leaves the previous checkpoint as it was. Loading verifies every byte; a damaged
checkpoint is reported and the previous one is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_ray.errors import CheckpointError
from rlhf_ray.run.storage import explained, fsync, fsync_tree, write_atomically

MANIFEST = "manifest.json"
STATE = "state.pt"
FORMAT = 1

OnEvent = Callable[[str, dict[str, Any]], None]


class Checkpoints:
    """The checkpoints of one run, `folder/step_N/`; the newest `keep` stay.

    One process calls `save`. Its `writer` may let others (learner ranks) write files into the folder it
    gets, on the same file system, as long as they have finished when it returns.
    """

    def __init__(self, folder: str | Path, keep: int = 2, on_event: OnEvent | None = None) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint: keep={keep} would delete the one just written; set keep >= 1")
        self.folder = Path(folder)
        self.keep = keep
        self._on_event = on_event

    def save(
        self, step: int, writer: Callable[[Path], None], state: Mapping[str, Any], protect: Collection[int] = ()
    ) -> Path:
        """Write one checkpoint; returns its folder.

        `state` is the driver's own: numbers, text, containers, tensors and numpy arrays. Checkpoints of the steps in
        `protect` stay, beside the newest `keep`.

        Raises:
            StorageError: no space or no permission; the checkpoints before are untouched.
            CheckpointError: `state` holds something that could not be loaded again.
        """
        temporary = self.folder / f"step_{step}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            with explained(f"checkpoint step_{step} (the ones before it are untouched)", self.folder):
                temporary.mkdir(parents=True)
                writer(temporary)
                _save_state(temporary / STATE, state)
                _seal(temporary, step)
                final = self._publish(temporary, step)
                write_atomically(self.folder / "latest", f"{final.name}\n")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs these bytes back
            raise
        self._prune(step, protect)
        return final

    def latest(self) -> tuple[int, Path, dict[str, Any]] | None:
        """(step, folder, state) of the newest whole checkpoint; None where there is none at all.

        Raises:
            CheckpointError: there are checkpoints and every one of them is damaged.
        """
        damaged = []
        for folder in self._candidates():
            try:
                return self.load(folder)
            except CheckpointError as error:
                damaged.append(str(error))
                warnings.warn(f"{error}; falling back to the one before it", stacklevel=2)
                self._event("checkpoint_damaged", checkpoint=folder.name, reason=str(error))
        if damaged:
            raise CheckpointError(
                f"{self.folder}: none of {len(damaged)} checkpoints is whole ({'; '.join(damaged)}), so "
                "nothing can be resumed; restore one from a backup, or start again in a new --run-dir"
            )
        return None

    def load(self, folder: str | Path) -> tuple[int, Path, dict[str, Any]]:
        """(step, folder, state) of this one checkpoint, verified.

        Raises:
            CheckpointError: it is missing or damaged; the message names the file.
        """
        folder = Path(folder)
        manifest = verify(folder)
        return manifest["step"], folder, _load_state(folder / STATE)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, whole or not, in rising order."""
        return sorted(_step_of(p) for p in self._folders())

    def _publish(self, temporary: Path, step: int) -> Path:
        final = self.folder / f"step_{step}"
        if final.exists():  # the same step again: the old one stays loadable until the new one has its name
            os.rename(final, self.folder / f"{final.name}.old-{uuid.uuid4().hex[:8]}")
        os.rename(temporary, final)
        fsync(self.folder)
        return final

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        whole = re.compile(r"step_\d+(\.old-\w+)?")
        return [p for p in self.folder.iterdir() if whole.fullmatch(p.name) and p.is_dir()]

    def _candidates(self) -> list[Path]:
        """What `latest` names first (people edit it to go back), then newest first."""
        pointer = self.folder / "latest"
        named = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else ""
        return sorted(self._folders(), key=lambda p: (p.name != named, -_step_of(p), p.name))

    def _prune(self, step: int, protect: Collection[int]) -> None:
        folders = self._folders()
        # Steps after the one just written belong to a timeline the run has left by resuming before them.
        abandoned = [p for p in folders if _step_of(p) > step]
        replaced = [p for p in folders if ".old-" in p.name]
        kept = sorted(set(folders) - set(abandoned) - set(replaced), key=_step_of)
        if abandoned:
            self._event("checkpoints_abandoned", checkpoints=sorted(p.name for p in abandoned), step=step)
        superseded = [p for p in kept[: -self.keep] if _step_of(p) not in protect]
        for folder in {*abandoned, *replaced, *superseded}:
            # renamed first: half a deletion must not look like a checkpoint
            os.rename(folder, folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}"))
        for leftover in self.folder.glob("step_*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _event(self, kind: str, **fields: Any) -> None:
        if self._on_event:
            self._on_event(kind, fields)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking size and sha256 of every file in it.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {manifest['format']}, and this version reads {FORMAT}; "
                                  "resume with the version of rlhf-ray that wrote it")  # fmt: skip
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was never finished") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged ({error})") from error
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{folder}: {name} has {size} bytes, and {entry['size']} were written")
    for name, digest in _sha256_of_all(folder, list(files)).items():
        if digest != files[name]["sha256"]:
            raise CheckpointError(f"{folder}: {name} is not what was written (its sha256 differs)")
    return manifest


def _seal(folder: Path, step: int) -> None:
    """Everything to disk, then the manifest, then the manifest to disk: with it, the checkpoint is whole."""
    paths = fsync_tree(folder)
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in _sha256_of_all(folder, names).items()
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _sha256_of_all(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(_sha256, [folder / name for name in names]), strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_").split(".")[0])


def _save_state(path: Path, state: Mapping[str, Any]) -> None:
    import torch

    torch.save(dict(state), path)
    try:
        _load_state(path)  # an object that cannot come back is found now, not on the day it is needed
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint: the state could not be loaded again ({error.__cause__}); keep numbers, text, "
            "lists, dicts, tensors and numpy arrays in it, no objects of other classes"
        ) from error


def _load_state(path: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    # weights_only: a checkpoint may come from elsewhere, and an ordinary unpickle runs what it holds
    kinds = [type(np.dtype(c)) for c in "?bBhHiIlLqQefd"]
    names = [np._core.multiarray._reconstruct, np._core.multiarray.scalar, np.ndarray, np.dtype, *kinds]
    try:
        with torch.serialization.safe_globals(names):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from error
