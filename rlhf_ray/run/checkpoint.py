"""Checkpoints that are whole or not there.

    step_N.tmp-*  written, hashed and forced to disk by those who write  ->  manifest.json last  ->  renamed to step_N
    ->  `latest` replaced  ->  older ones pruned

A crash at any point leaves the previous checkpoint as it was. Loading verifies every byte, the manifest's own too; a
damaged checkpoint is reported and the previous one is taken.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf_ray.errors import CheckpointError, ConfigError, DivergenceError
from rlhf_ray.models.written import File, Written, files_of, force_to_disk
from rlhf_ray.run.storage import explained, fsync_tree, opened, read_object, sealed, to_json, write_atomically

MANIFEST = "manifest.json"
STATE = "state.pt"
FORMAT = 3
# Over NFS, what another machine has written may be seen a little later.
PATIENCE_S = 5.0

OnEvent = Callable[[str, dict[str, Any]], None]
Writer = Callable[[Path], Mapping[str, Written | None] | None]


@dataclass(frozen=True)
class Ranking:
    """What checkpoints are ranked by: a number of the steps that they were made after."""

    by: str
    keep: int  # so many of the best stay, beside the newest
    higher: bool = True


@dataclass(frozen=True)
class Unsealed:
    """A checkpoint that is being written, under a name that nobody takes for one."""

    step: int
    folder: Path

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Checkpoints:
    """The checkpoints of one run, `folder/step_N/`; the newest `keep` stay, and the best by `ranking`.

    One process calls `save`. Its `writer` may let others (learner ranks) write files into the folder it gets, on the
    same file system, as long as they have finished when it returns.
    """

    def __init__(
        self, folder: str | Path, keep: int = 2, on_event: OnEvent | None = None, ranking: Ranking | None = None
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint: keep={keep} would delete the one just written; set keep >= 1")
        self.folder = Path(folder)
        self.keep = keep
        self.ranking = ranking
        self._on_event = on_event

    def save(
        self, step: int, writer: Writer, state: Mapping[str, Any], protect: Collection[int] = (),
        metrics: Mapping[str, float] = {},
    ) -> Path:  # fmt: skip
        """Write one checkpoint; returns its folder.

        Args:
            writer: fills the folder that it is given. It returns what was written into each folder in there, as those
                say who wrote it; what nobody speaks of is hashed here.
            state: the driver's own: numbers, text, containers, tensors and numpy arrays.
            protect: checkpoints of these steps stay, beside the newest `keep`.
            metrics: of the step, for `ranking`.
        Raises:
            StorageError: no space or no permission; the checkpoints before are untouched.
            CheckpointError: `state` holds something that could not be loaded again.
            ConfigError: somebody has written to a disk that this process does not see.
            DivergenceError: the weights are no longer finite. Nobody could go on from them, so nothing is kept of them.
        """
        told: dict[str, Written | None] = {}
        unsealed = self.begin(step, lambda folder: told.update(writer(folder) or {}), state)
        return self.seal(unsealed, lambda: told, protect, metrics)

    def begin(self, step: int, fill: Callable[[Path], None], state: Mapping[str, Any]) -> Unsealed:
        """The first half of `save`: `fill` may leave others who go on writing into the folder that it is given."""
        unsealed = Unsealed(step, self.folder / f"step_{step}.tmp-{uuid.uuid4().hex[:8]}")
        with self._or_nothing(unsealed):
            unsealed.folder.mkdir(parents=True)
            fill(unsealed.folder)
            _save_state(unsealed.folder / STATE, state)
        return unsealed

    def seal(
        self, unsealed: Unsealed, told: Callable[[], Mapping[str, Written | None]], protect: Collection[int] = (),
        metrics: Mapping[str, float] = {},
    ) -> Path:  # fmt: skip
        """The second half, when all have written. `told()` is what they say that they wrote."""
        step = unsealed.step
        with self._or_nothing(unsealed):
            parts = _told(told())
            self._require_finite(step, parts)
            files = {name: file for written in parts.values() for name, file in written.files.items()}
            require_seen(unsealed.folder, files)
            value = metrics.get(self.ranking.by) if self.ranking else None
            layout = {part: dict(written.layout) for part, written in parts.items()}
            _seal(unsealed.folder, {"format": FORMAT, "step": step, "metric": value, "parts": layout}, files)
            final = self._publish(unsealed.folder, step)
            write_atomically(self.folder / "latest", f"{final.name}\n")
        self._prune(step, protect)
        return final

    @contextmanager
    def _or_nothing(self, unsealed: Unsealed) -> Iterator[None]:
        try:
            with explained(f"checkpoint step_{unsealed.step} (the ones before it are untouched)", self.folder):
                yield
        except BaseException:
            unsealed.remove()  # a full disk needs these bytes back
            raise

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

    def small_file(self, name: str) -> dict[str, Any]:
        """The JSON object in this file of the newest checkpoint that has it as it was written; {} where none has.
        Nothing else of that checkpoint is verified."""
        for folder in self._candidates():
            entry = (opened(read_object(folder / MANIFEST)) or {}).get("files", {}).get(name)
            path = folder / name
            if entry is not None and path.is_file() and [asdict(file) for file in files_of([path])] == [entry]:
                return read_object(path)
        return {}

    def _require_finite(self, step: int, told: Mapping[str, Written]) -> None:
        broken = [part for part, written in told.items() if not written.finite]
        if broken:
            before = [s for s in self.steps() if s < step]
            where = f"the checkpoint of step {before[-1]} has the last that were" if before else "there is none before"
            raise DivergenceError(
                f"step {step}: the weights of the {' and the '.join(broken)} are no longer finite, so this checkpoint "
                f"is not kept; {where}. Lower the learning rate, look for rewards or rows that no model can follow, "
                "and go on from there with --resume auto"
            )

    def _publish(self, temporary: Path, step: int) -> Path:
        final = self.folder / f"step_{step}"
        if final.exists():  # the same step again: the old one stays loadable until the new one has its name
            os.rename(final, self.folder / f"{final.name}.old-{uuid.uuid4().hex[:8]}")
        os.rename(temporary, final)
        force_to_disk(self.folder)
        return final

    def _folders(self) -> list[Path]:
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: is a file, not a folder of checkpoints; move it away")
        if not self.folder.is_dir():
            return []
        whole = re.compile(r"step_\d+(\.old-\w+)?")
        return [p for p in self.folder.iterdir() if whole.fullmatch(p.name) and p.is_dir()]

    def _candidates(self) -> list[Path]:
        """What `latest` names first (people edit it to go back), then newest first."""
        try:
            named = (self.folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            named = ""
        return sorted(self._folders(), key=lambda p: (p.name != named, -_step_of(p), p.name))

    def _prune(self, step: int, protect: Collection[int]) -> None:
        folders = self._folders()
        # Steps after the one just written belong to a timeline the run has left by resuming before them.
        abandoned = [p for p in folders if _step_of(p) > step]
        replaced = [p for p in folders if ".old-" in p.name]
        kept = sorted(set(folders) - set(abandoned) - set(replaced), key=_step_of)
        if abandoned:
            self._event("checkpoints_abandoned", checkpoints=sorted(p.name for p in abandoned), step=step)
        stay = {*kept[-self.keep :], *self._best(kept)}
        superseded = [p for p in kept if p not in stay and _step_of(p) not in protect]
        for folder in {*abandoned, *replaced, *superseded}:
            # renamed first: half a deletion must not look like a checkpoint
            os.rename(folder, folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}"))
        for leftover in self.folder.glob("step_*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _best(self, folders: Collection[Path]) -> list[Path]:
        """Those that stay for their metric; of two equal ones the later."""
        if self.ranking is None:
            return []
        values = {p: (opened(read_object(p / MANIFEST)) or {}).get("metric") for p in folders}
        sign = 1 if self.ranking.higher else -1
        ranked = sorted((sign * v, _step_of(p), p) for p, v in values.items() if isinstance(v, int | float))
        return [p for _, _, p in ranked[-self.ranking.keep :]] if self.ranking.keep else []

    def _event(self, kind: str, **fields: Any) -> None:
        if self._on_event:
            self._on_event(kind, fields)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking its own sha256, its step, and size and sha256 of every file in it.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    manifest = _manifest(folder)
    if manifest["step"] != _step_of(folder):
        raise CheckpointError(f"{folder}: {MANIFEST} is of step {manifest['step']}; the folder has another's name")
    files = {name: File(entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    if STATE not in files:
        raise CheckpointError(f"{folder}: {MANIFEST} does not name {STATE}, without which nothing can be resumed")
    for name, file in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{folder}: {MANIFEST} names {name}, which lies outside; it is not ours")
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        size = path.stat().st_size
        if size != file.size:
            raise CheckpointError(f"{folder}: {name} has {size} bytes, and {file.size} were written")
    parts = {PurePosixPath(name).parts[0] for name in files if "/" in name}
    for path in sorted(path for part in parts for path in (folder / part).rglob("[!.]*") if path.is_file()):
        if path.relative_to(folder).as_posix() not in files:
            raise CheckpointError(f"{folder}: {path.relative_to(folder)} is no part of it; move it away")
    try:
        found = files_of([folder / name for name in files])
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    for (name, file), now in zip(files.items(), found, strict=True):
        if now != file:
            raise CheckpointError(f"{folder}: {name} is not what was written (its sha256 differs)")
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    """Checked as far as it can be without the files that it names."""
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was never finished")
    given = read_object(folder / MANIFEST)
    if isinstance(given.get("format"), int) and given["format"] != FORMAT:
        raise CheckpointError(f"{folder}: format {given['format']}, and this version reads {FORMAT}; "
                              "resume with the version of rlhf-ray that wrote it")  # fmt: skip
    manifest = opened(given)
    if manifest is None:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged")
    return manifest


def _told(written: Mapping[str, Written | None]) -> dict[str, Written]:
    """What each part says that was written, by names inside the checkpoint."""
    return {
        part: Written({f"{part}/{name}": file for name, file in said.files.items()}, said.finite, said.layout)
        for part, said in written.items() if said is not None
    }  # fmt: skip


def require_seen(folder: Path, files: Mapping[str, File]) -> None:
    """Raises ConfigError where one of the files is not seen here as it was written."""
    until = time.monotonic() + PATIENCE_S
    for name, file in files.items():
        path = folder / name
        while not (path.is_file() and path.stat().st_size == file.size):
            if time.monotonic() > until:
                raise ConfigError(
                    f"{path}: a rank has written {file.size} bytes there, and this machine does not see them: the run "
                    "directory is not on a disk that all machines of the run share. Set --run-dir to one that is; the "
                    "checkpoints before are untouched"
                )
            time.sleep(0.1)


def _seal(folder: Path, manifest: Mapping[str, Any], told: Mapping[str, File]) -> None:
    """Everything to disk, then the manifest, then the manifest to disk: with it, the checkpoint is whole."""
    paths = {path.relative_to(folder).as_posix(): path for path in fsync_tree(folder) if path.is_file()}
    rest = [name for name in paths if name not in told]
    files = {**told, **dict(zip(rest, files_of([paths[name] for name in rest]), strict=True))}
    entries = {name: asdict(files[name]) for name in sorted(files)}
    write_atomically(folder / MANIFEST, to_json(sealed({**manifest, "files": entries}), indent=1) + "\n")


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
