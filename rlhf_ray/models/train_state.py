"""A network in training on disk: by parameter, and not by who held what of it.

    engine.json              who wrote it: engine, ranks, ZeRO stage, dtype, optimiser steps; which tensors there are
    config.json ...          the network's own, as in a model's folder
    rank_0.safetensors ...   of each rank the pieces that it held: KIND/NAME, flat, and where each begins

So any engine, on any number of ranks and at any ZeRO stage, goes on from it, and a model can be made of it without any.
Nothing here is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_ray.errors import CheckpointError
from rlhf_ray.models.trainable import is_packed
from rlhf_ray.models.written import Written, written

META = "engine.json"
# What is trained: its float32 master and AdamW's moments. What is not: its values.
MASTER, MOMENTS, FIXED = "master", ("exp_avg", "exp_avg_sq"), "fixed"
# In AdamW's state: how many gradients the moments have seen.
STEP = "step"
_PIECES = "pieces"

Shapes = dict[str, tuple[int, ...]]
OptimizerState = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Held:
    """Elements `start`, ... of the tensor `name`, as a process holds them: `length` of `flat`, from `offset` on.

    Attributes:
        shape: of the whole tensor.
        flat: for a trained one what the optimiser knows: a master, or with ZeRO a buffer of pieces of many.
    """

    name: str
    shape: tuple[int, ...]
    flat: Tensor
    start: int
    offset: int
    length: int

    @classmethod
    def whole(cls, name: str, tensor: Tensor, flat: Tensor | None = None) -> Held:
        """All of `tensor`, in `flat`, which has its shape."""
        return cls(name, tuple(tensor.shape), tensor if flat is None else flat, 0, 0, tensor.numel())

    def read(self, flat: Tensor | None = None) -> Tensor:
        """[length] of `flat`, or of a moment of its shape; shares its memory where it can."""
        values = (self.flat if flat is None else flat).detach().reshape(-1)
        return values[self.offset : self.offset + self.length]

    @torch.no_grad()
    def write(self, values: Tensor, flat: Tensor | None = None) -> None:
        """Undo `read`."""
        target = (self.flat if flat is None else flat).detach()
        if target.numel() == self.length:
            target.copy_(values.view(target.shape))  # whatever its strides
        else:
            target.view(-1)[self.offset : self.offset + self.length].copy_(values)


def trained_shapes(module: nn.Module) -> Shapes:
    return {name: _shape(p) for name, p in module.named_parameters() if p.requires_grad}


def fixed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is not trained: frozen parameters and buffers. Of a model with packed weights (QLoRA) nothing: they come
    again from the same folder, and no module takes their scales back."""
    if any(map(is_packed, module.modules())):
        return {}
    parameters = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    kept = module.state_dict(keep_vars=True)
    return parameters | {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves a parameter of no elements


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: _shape(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, flat, from element `start` on. `step`: of a moment, how many gradients it has seen."""

    kind: str
    name: str
    start: int
    values: Tensor
    step: float = 0.0


def pieces(trained: Iterable[Held], optimizer: OptimizerState, fixed: Iterable[Held]) -> Iterator[Piece]:
    """What this process holds, nothing copied. A moment of which nothing was ever computed is left out."""
    for held in trained:
        yield Piece(MASTER, held.name, held.start, held.read())
        state = optimizer.get(held.flat) or {}
        for moment in MOMENTS:
            if moment in state:
                yield Piece(moment, held.name, held.start, held.read(state[moment]), float(state[STEP]))
    for held in fixed:
        yield Piece(FIXED, held.name, held.start, held.read())


def copied(held: Iterable[Piece]) -> list[Piece]:
    """In this process's own memory: the next step may change what they were made of."""
    return [replace(piece, values=piece.values.to("cpu", copy=True)) for piece in held]


def write_state(
    folder: Path, rank: int, held: Iterable[Piece], described: Mapping[str, str], layout: Mapping[str, Any]
) -> Written:
    """Writes the pieces of this rank, rank 0 also what `description` gave; all of it forced to disk and hashed."""
    folder.mkdir(parents=True, exist_ok=True)
    held = list(held)
    paths = [write_pieces(folder, rank, held)]
    for name, text in described.items() if rank == 0 else ():
        paths.append(folder / name)
        paths[-1].write_text(text, encoding="utf-8")
    return written(folder, paths, (piece.values for piece in held if piece.kind in (MASTER, FIXED)), layout)


def write_pieces(folder: Path, rank: int, held: Iterable[Piece]) -> Path:
    """The file of this rank."""
    tensors, places = {}, {}
    for piece in held:
        key = f"{piece.kind}/{piece.name}"
        tensors[key] = piece.values.cpu().contiguous()
        places[key] = [piece.start, piece.step]
    path = _file_of(folder, rank)
    save_file(tensors, path, {_PIECES: json.dumps(places)})
    return path


def description(layout: Mapping[str, Any], module: nn.Module, steps: int) -> dict[str, str]:
    """The other files by name. To be made between steps: inside one, parameters may be switched off for a pass
    (LoRA's, for the reference), and a config may be another for an export.

    `layout`: engine, world_size, zero_stage and dtype.
    """
    shapes = {"trained": trained_shapes(module), "fixed": shapes_of(fixed_tensors(module))}
    found = {META: json.dumps({**layout, "steps": steps, **shapes}, indent=1)}
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # of LoRA
    for name in ("config", "generation_config"):
        if (settings := getattr(inner, name, None)) is not None:
            found[f"{name}.json"] = settings.to_json_string()
    return found


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.safetensors"


@dataclass(frozen=True)
class _Part:
    start: int
    length: int
    step: float
    file: Path
    key: str


class TrainState:
    """What `write_state` has left in a folder. Raises CheckpointError where that is incomplete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        try:
            self.meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
            self.steps: int = self.meta["steps"]
            self.trained, self.fixed = ({n: tuple(s) for n, s in self.meta[k].items()} for k in ("trained", "fixed"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder / META} does not exist: the checkpoint is incomplete, or was written by an engine of your "
                "own; resume with the engine that wrote it, or from another checkpoint"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / META} is damaged ({error}); resume from another checkpoint") from error

    def require_fits(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Raises CheckpointError where it is of another model, or of another dtype."""
        if self.meta.get("dtype") != str(dtype):
            raise CheckpointError(
                f"{self.folder} was written with dtype={self.meta.get('dtype')}, this run has dtype={dtype}; set it "
                "back, or resume from another checkpoint"
            )
        for here, there in ((trained_shapes(module), self.trained), (shapes_of(fixed_tensors(module)), self.fixed)):
            differ = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
            if differ:
                name = min(differ)
                raise CheckpointError(
                    f"{self.folder} does not fit this model: {name} is {_said(there.get(name))} there and "
                    f"{_said(here.get(name))} here; resume with the same model settings, or from another checkpoint"
                )

    @property
    def dtype(self) -> torch.dtype:
        """What the network computed in."""
        return getattr(torch, str(self.meta["dtype"]).removeprefix("torch."))

    def weight(self, name: str) -> Tensor:
        """A tensor of the network, whole, as it computed with it."""
        if name in self.trained:
            return self.values(MASTER, name).view(self.trained[name]).to(self.dtype)
        return self.values(FIXED, name).view(self.fixed[name])

    def gradients(self, name: str) -> float:
        """How many the moments of a parameter have seen; of none there may be no moments."""
        return max((part.step for part in self._parts.get((MOMENTS[0], name), [])), default=0.0)

    def values(self, kind: str, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """[length] elements of a tensor, from `start` on, put together from whichever ranks held them; by default all.

        Raises CheckpointError if some were written by nobody.
        """
        parts = self._parts.get((kind, name), [])
        end = sum(part.length for part in parts) if length is None else start + length
        found = []
        for part in parts:
            first, last = max(start, part.start), min(end, part.start + part.length)
            if first < last:
                found.append(self._open(part.file).get_slice(part.key)[first - part.start : last - part.start])
        if sum(map(len, found)) != end - start or not found:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} is not all there; resume from another checkpoint"
            )
        return found[0] if len(found) == 1 else torch.cat(found)

    def restore(self, trained: Iterable[Held], optimizer: OptimizerState, step_device: torch.device | str) -> None:
        """Put masters and moments where this process holds them. `step_device`: where its AdamW counts."""
        trained = list(trained)
        for held in trained:
            optimizer.pop(held.flat, None)
        for held in trained:
            held.write(self.values(MASTER, held.name, held.start, held.length))
            if not (seen := self.gradients(held.name)):
                continue
            state = optimizer.setdefault(held.flat, {})
            # A buffer of many counts for all of them.
            state[STEP] = torch.tensor(max(seen, float(state.get(STEP, 0.0))), dtype=torch.float32, device=step_device)
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(held.flat, memory_format=torch.preserve_format)
                held.write(self.values(moment, held.name, held.start, held.length), state[moment])

    def restore_fixed(self, fixed: Iterable[Held]) -> None:
        for held in fixed:
            held.write(self.values(FIXED, held.name, held.start, held.length))

    @cached_property
    def _parts(self) -> dict[tuple[str, str], list[_Part]]:
        found: dict[tuple[str, str], list[_Part]] = {}
        for rank in range(self.meta["world_size"]):
            path = _file_of(self.folder, rank)
            try:
                file = self._open(path)
                places = json.loads(file.metadata()[_PIECES])
                for key, (start, step) in places.items():
                    kind, _, name = key.partition("/")
                    part = _Part(start, file.get_slice(key).get_shape()[0], step, path, key)
                    found.setdefault((kind, name), []).append(part)
            except (KeyError, TypeError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); resume from another checkpoint") from error
        return {name: sorted(parts, key=lambda part: part.start) for name, parts in found.items()}

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            if not path.is_file():
                raise CheckpointError(f"{self.folder} lacks {path.name}; resume from another checkpoint")
            self._files[path] = safe_open(path, "pt")
        return self._files[path]


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a number"
