"""Receives weights into a plain Hugging Face module of this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ConfigError, SyncError
from rlhf_ray.sync.buckets import read
from rlhf_ray.sync.segment import AttachedSegments
from rlhf_ray.sync.session import SyncSession
from rlhf_ray.sync.shared_memory import check_same_memory

TRANSPORTS = ("in_process", "shared_memory")


class HFReceiver:
    """vLLM's four calls for `module`. Strict: unknown or missing names and other shapes raise SyncError.

    Values are cast to the module's dtype. Transports: in_process, shared_memory.
    """

    def __init__(self, module: nn.Module, *, owner: str = "hf generator") -> None:
        # state_dict lists tied weights under each name, and persistent buffers too.
        self._targets: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
        self._required = {id(p): name for name, p in module.named_parameters()}
        self._covered: set[int] = set()
        self._session = SyncSession(owner)
        self._segments = AttachedSegments()

    @property
    def version(self) -> int:
        return self._session.version

    def require_whole(self, action: str) -> None:
        """Raises SyncError if an update failed or was cut off: call it before the module is used."""
        self._session.require_whole(action)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        transport = init_info.get("transport")
        if transport not in TRANSPORTS:
            raise ConfigError(
                f"{self._session.owner}: cannot receive weights by {transport or 'nccl or cuda_ipc'}, only by "
                f"{' or '.join(TRANSPORTS)}; set sync.transport to one of them, or generator.engine=vllm"
            )
        if transport == "shared_memory":
            check_same_memory(init_info["probe"], init_info["nonce"])

    def start_weight_update(self) -> None:
        self._session.start()
        self._covered = set()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._session.receive(update_info)
        try:
            self._load(self._pairs(update_info))
        except SyncError:
            raise
        except Exception as error:
            raise self._session.fail(f"{type(error).__name__}: {error}") from error

    def _pairs(self, info: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
        if "tensors" in info:
            return zip(info["names"], info["tensors"], strict=True)
        flat = self._segments.flat(info["segment"], info["nbytes"])
        return read(flat, info["names"], info["dtype_names"], info["shapes"], info["offsets"])

    @torch.no_grad()
    def _load(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in pairs:
            target = self._targets.get(name)
            if target is None:
                raise self._session.fail(f"it has no parameter {name!r}: learner and generator are different models")
            if target.shape != tensor.shape:
                raise self._session.fail(
                    f"{name} has shape {tuple(target.shape)} here and {tuple(tensor.shape)} in the learner"
                )
            target.copy_(tensor)
            self._covered.add(id(target))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._session.check_complete()
        missing = [name for key, name in self._required.items() if key not in self._covered]
        if missing:
            raise self._session.fail(f"{len(missing)} parameters were not sent, among them {missing[:3]}")
        self._session.finish(weight_version)

    def close(self) -> None:
        self._segments.close()
