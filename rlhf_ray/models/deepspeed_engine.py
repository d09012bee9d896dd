"""Training on N ranks with DeepSpeed ZeRO 0-3; zero_state.py knows its inside."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rlhf_ray.errors import CheckpointError, ConfigError, ModelError, StepError, StorageError
from rlhf_ray.models.deepspeed_library import deepspeed_library, quiet
from rlhf_ray.models.devices import with_index
from rlhf_ray.models.pretrained import Export, exported_state, not_finite, write_pretrained
from rlhf_ray.models.process_group import join_ranks
from rlhf_ray.models.saving import Saving
from rlhf_ray.models.train_state import Held, Piece, TrainState, copied, description, pieces, write_state
from rlhf_ray.models.trainable import (
    adam_groups,
    check_train_dtype,
    clip_scale,
    enable_gradient_checkpointing,
    switch_dropout_off,
)
from rlhf_ray.models.written import Written, together
from rlhf_ray.models.zero_state import fixed_here, show_masters, trained_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

Offload = Literal["none", "optimizer", "parameters"]

# ZeRO-3 gathers this many elements at a time for export: one collective for many small tensors, and never
# more than this (or one tensor) beside the shards.
GATHER_ELEMENTS = 64 * 1024 * 1024
BUCKET_ELEMENTS = 200_000_000


class DeepSpeedEngine:
    """A `TrainEngine` over `world_size` processes, each of which builds it with the same model.

    In bfloat16 DeepSpeed keeps float32 masters, as `TorchEngine` does. Its ZeRO 0 would sum micro-batches in
    bfloat16 there, so bfloat16 with zero_stage 0 runs as ZeRO 1: same gradients, summed in float32.

    `master_address` and `master_port` name rank 0; without them, MASTER_ADDR and MASTER_PORT. If
    torch.distributed is already initialised in this process (a second engine), its group is used.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        zero_stage: int = 2,
        offload: Offload = "none",
        torch_adam: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        master_address: str | None = None,
        master_port: int | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        check_train_dtype(dtype)
        self.device = with_index(torch.device(device))
        _check_options(self.device, zero_stage, offload)
        self.zero_stage = zero_stage
        self.max_grad_norm = max_grad_norm
        self.steps = 0
        self._has_gradients = self._was_cut_off = False
        self.rank, self.world_size = join_ranks(self.device, rank, world_size, master_address, master_port, timeout_s)
        self._saving: Saving | None = None
        self._dtype = dtype
        self._layout = {
            "engine": "deepspeed", "world_size": self.world_size, "zero_stage": zero_stage, "dtype": str(dtype),
        }  # fmt: skip
        self._real_stage = max(zero_stage, 1) if dtype == torch.bfloat16 else zero_stage
        switch_dropout_off(module)
        if gradient_checkpointing:
            enable_gradient_checkpointing(module)
        adam = {"lr": 0.0, "betas": list(betas), "eps": eps, "weight_decay": weight_decay}
        config = _deepspeed_config(
            adam, self._real_stage, offload, torch_adam, dtype, self.device, max_grad_norm, module
        )
        self._deepspeed = _initialize(module, adam_groups(module, weight_decay), config)
        self.module: nn.Module = self._deepspeed.module

    def __call__(self, **inputs: Any) -> ModelOutput:
        return self._deepspeed(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self._was_cut_off:
            raise StepError(
                "an earlier step was cut off, and DeepSpeed still holds gradients of some of its rows; start anew from "
                "a checkpoint (--resume auto)"
            )
        self._has_gradients = True
        self._deepspeed.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks and (with accumulation steps 1) sums over micro-batches.
        self._deepspeed.backward(loss * self.world_size)

    def step(self, lr: float, scale: float = 1.0) -> float:
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm = self._step_replicated(scale) if self._real_stage == 0 else self._step_sharded(scale)
        self._has_gradients = False
        if math.isfinite(norm):
            self.steps += 1
        return norm

    def discard(self) -> None:
        self._was_cut_off |= self._has_gradients

    def _step_replicated(self, scale: float) -> float:
        # Stage 0 in float32 is a bare AdamW over all-reduced gradients: DeepSpeed neither reports their norm
        # nor refuses one that is not finite.
        grads = [p.grad for p in self.module.parameters() if p.requires_grad and p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(grads, scale)
        norm = float(nn.utils.get_total_norm(grads)) if grads else 0.0
        if not math.isfinite(norm):
            self._deepspeed.zero_grad()
            return norm
        clip = clip_scale(norm, self.max_grad_norm)
        if clip < 1.0:
            torch._foreach_mul_(grads, clip)
        self._deepspeed.step()
        return norm

    def _step_sharded(self, scale: float) -> float:
        optimizer = self._deepspeed.optimizer
        if scale == 1.0:
            self._deepspeed.step()
        elif hasattr(optimizer, "fp32_groups_gradients_flat"):  # of bfloat16 with ZeRO 1
            torch._foreach_mul_(optimizer.fp32_groups_gradients_flat, scale)
            self._deepspeed.step()
        else:
            # DeepSpeed's own way to divide gradients late, where it takes their norm and clips them.
            optimizer.loss_scale = 1 / scale
            self._deepspeed.step()
            optimizer.loss_scale = 1.0
        if not self._deepspeed.was_step_applied():
            return math.inf
        return float(self._deepspeed.get_global_grad_norm())

    def all_reduce(self, value: Tensor, op: str = "sum") -> Tensor:
        operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
        if op not in operations:
            raise ValueError(f"all_reduce: op={op!r} is unknown; use one of {sorted(operations)}")
        result = value.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(result, operations[op])
        return result.to(value.device)

    def export(self, what: Export = "model") -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad(), _BucketGather(self.module, GATHER_ELEMENTS) as gather:
            yield from exported_state(self.module, what, gather)

    def save(self, folder: Path) -> Written:
        self.begin_save(folder, background=False)
        return self.saved()

    def begin_save(self, folder: Path, background: bool = True) -> None:
        if self._saving is not None:
            self._saving.wait()  # nobody asks for its end any more
        # What every rank holds whole is dealt out, so that all have as much to write.
        trained, fixed = self._trained(self.world_size), fixed_here(self.module, self.rank, self.world_size)
        held: Iterable[Piece] = pieces(trained, self._optimizer_state, fixed)
        if background:
            held = copied(held)
        described = description(self._layout, self.module, self.steps)
        write = partial(write_state, folder, self.rank, held, described, self._layout)
        self._saving = Saving(write, background)

    def is_saved(self) -> bool:
        waiting = self._saving is not None and not self._saving.done()
        return not self.all_reduce(torch.tensor(int(waiting)), "max").item()

    def saved(self) -> Written:
        saving, self._saving = self._saving, None
        if saving is None:
            raise StepError("nothing is being saved: `begin_save` comes first")
        mine: Written | str
        try:
            mine = saving.result()
        except Exception as error:  # the other ranks are waiting
            mine = f"rank {self.rank} could not write its part of a checkpoint ({error})"
        parts = [mine] * self.world_size
        torch.distributed.all_gather_object(parts, mine)
        if failed := [part for part in parts if isinstance(part, str)]:
            raise StorageError(f"{failed[0]}; make room on the disk of the run directory, then --resume auto")
        return together(parts)

    def load(self, folder: Path) -> None:
        problem, steps = None, self.steps
        try:
            state = TrainState(folder)
            state.require_fits(self.module, self._dtype)
            state.restore_fixed(fixed_here(self.module, self.rank))
            state.restore(self._trained(), self._optimizer_state, "cpu")
            steps = state.steps
        except (CheckpointError, OSError) as error:  # the other ranks are waiting
            problem = str(error)
        self._agree(problem)
        with quiet():
            show_masters(self._deepspeed.optimizer, self._real_stage)
        self.steps = steps

    def _trained(self, ranks: int = 1) -> Iterator[Held]:
        return trained_here(self.module, self._deepspeed.optimizer, self._real_stage, self.rank, ranks)

    @property
    def _optimizer_state(self) -> Any:
        return self._deepspeed.optimizer.state

    def _agree(self, problem: str | None, kind: type[Exception] = CheckpointError) -> None:
        """Raise the first rank's problem on every rank, if any has one: who raised alone would leave the others
        waiting for it in the next collective."""
        problems: list[str | None] = [problem] * self.world_size
        torch.distributed.all_gather_object(problems, problem)
        for rank, found in enumerate(problems):
            if found is not None:
                raise kind(found if all(problems) else f"rank {rank}: {found}")

    def save_pretrained(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase | None, what: Export = "model", ends: Sequence[int] = ()
    ) -> None:
        weights = self.module.named_parameters()
        self._agree(not_finite(((name, getattr(p, "ds_tensor", p)) for name, p in weights), folder), ModelError)
        state, problem = self.export(what), None
        if self.rank == 0:
            try:
                write_pretrained(self.module, state, folder, tokenizer, what, ends)
            except Exception as error:  # the other ranks are waiting; safetensors has errors of its own for a full disk
                problem = f"the model cannot be written to {folder} ({error}); make room, or name another folder"
        for _ in state:  # each is a collective, also where rank 0 has stopped listening
            pass
        self._agree(problem)

    def close(self) -> None:
        self._deepspeed.destroy()


def _check_options(device: torch.device, zero_stage: int, offload: str) -> None:
    if zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"learner.zero_stage={zero_stage} does not exist; choose 0, 1, 2 or 3")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"DeepSpeed does not run on {device.type}: it has no communication backend there; set learner.engine=torch"
        )
    if offload not in ("none", "optimizer", "parameters"):
        raise ConfigError(f"learner.offload={offload!r} is unknown; choose none, optimizer or parameters")
    if offload == "optimizer" and zero_stage == 0:
        raise ConfigError("learner.offload=optimizer needs sharded states; set learner.zero_stage=1, 2 or 3")
    if offload == "parameters" and zero_stage != 3:
        raise ConfigError("learner.offload=parameters needs sharded parameters; set learner.zero_stage=3")


def _deepspeed_config(
    adam: dict[str, Any], stage: int, offload: str, torch_adam: bool, dtype: torch.dtype, device: torch.device,
    max_grad_norm: float, module: nn.Module,
) -> dict[str, Any]:  # fmt: skip
    # ZeRO allocates buffers of this size whatever the model's: DeepSpeed's own 500M would be 2 GB for a toy.
    # It must be even (NCCL aligns to 4 bytes).
    bucket = min(BUCKET_ELEMENTS, 2 * sum(p.numel() for p in module.parameters()))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    pinned = device.type == "cuda"
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    clipping = 0.0 if clip_scale(math.inf, max_grad_norm) == 1.0 else max_grad_norm
    config: dict[str, Any] = {
        # Nominal: micro-batches vary in size and number, and their losses arrive already normalised.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clipping if stage > 0 else 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        # torch's own AdamW needs no compiler; DeepSpeed's kernels are built on first use.
        "optimizer": {"type": "AdamW", "params": adam | ({"torch_adam": True} if torch_adam else {})},
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        # Micro-batches and ranks: DeepSpeed's own way is to send bfloat16.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def _initialize(module: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any]) -> Any:
    deepspeed = deepspeed_library()
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=groups, config=config, dist_init_required=False
        )
    return engine


class _BucketGather:
    """Makes ZeRO-3 shards whole when asked for some of them, together with those that come next.

    One collective gathers at most `limit` elements, or what was asked for; it stays whole until something
    outside of it is wanted. Parameters that are not sharded pass through.
    """

    def __init__(self, module: nn.Module, limit: int) -> None:
        sharded = (p for p in module.state_dict(keep_vars=True).values() if hasattr(p, "ds_id"))
        self._order = list({id(p): p for p in sharded}.values())
        self._position = {id(p): i for i, p in enumerate(self._order)}
        self._limit = limit
        self._whole: set[int] = set()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> _BucketGather:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def __call__(self, tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        wanted = {id(t): t for t in tensors if id(t) in self._position}
        if not wanted.keys() <= self._whole:
            self._open.close()
            self._gather(wanted)
        return contextlib.nullcontext()

    def _gather(self, bucket: dict[int, Tensor]) -> None:
        elements = sum(p.ds_numel for p in bucket.values())
        start = min(self._position[key] for key in bucket)
        for parameter in self._order[start:]:
            if id(parameter) in bucket:
                continue
            elements += parameter.ds_numel
            if elements > self._limit:
                break
            bucket[id(parameter)] = parameter
        self._open.enter_context(deepspeed_library().zero.GatheredParameters(list(bucket.values())))
        self._whole = set(bucket)
