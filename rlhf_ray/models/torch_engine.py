"""Training in one process: CPU, MPS or one GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ModelError, StepError
from rlhf_ray.models.pretrained import Export, exported_state, not_finite, plain_state, write_pretrained
from rlhf_ray.models.saving import Saving
from rlhf_ray.models.train_state import Held, Piece, TrainState, copied, description, fixed_tensors, pieces, write_state
from rlhf_ray.models.trainable import (
    adam_groups,
    check_train_dtype,
    clip_scale,
    enable_gradient_checkpointing,
    switch_dropout_off,
)
from rlhf_ray.models.written import Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import ModelOutput


class TorchEngine:
    """A `TrainEngine` of one rank.

    In bfloat16 the module computes in bfloat16, while gradients are summed and AdamW runs in float32 on a
    master copy of each trainable parameter, which is rounded back into the module after each step: lr 1e-6
    moves a weight by less than bfloat16 can show, so without the masters nothing would ever be learned.
    """

    rank = 0
    world_size = 1

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
    ) -> None:
        check_train_dtype(dtype)
        self.module = module
        self.device = torch.device(device)
        self.max_grad_norm = max_grad_norm
        self.steps = 0
        self._saving: Saving | None = None
        self._dtype = dtype
        self._layout = {"engine": "torch", "world_size": 1, "zero_stage": 0, "dtype": str(dtype)}
        for parameter in module.parameters():
            # Parameters only: rotary frequencies and other float32 buffers must not be rounded. Quantised
            # weights (QLoRA) are integers and stay as they are.
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        module.to(self.device)
        switch_dropout_off(module)
        if gradient_checkpointing:
            enable_gradient_checkpointing(module)
        groups = adam_groups(module, weight_decay)
        self._parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._masters: list[Tensor] = []
        for group in groups:
            group["params"] = [_master(p) for p in group["params"]]
            self._masters += group["params"]
        # Fused: one kernel a step, where the default loops over parameters in Python.
        fused = self.device.type in ("cpu", "cuda")
        self._step_device = self.device if fused else torch.device("cpu")
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused)

    def __call__(self, **inputs: Any) -> ModelOutput:
        return self.module(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is master or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> float:
        grads = self._gradients()
        if scale != 1.0:
            torch._foreach_mul_(grads, scale)
        norm = self.gradient_norm()
        if math.isfinite(norm):
            clip = clip_scale(norm, self.max_grad_norm)
            if clip < 1.0:
                torch._foreach_mul_(grads, clip)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._round_masters()
            self.steps += 1
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Of what has been added up so far, before clipping."""
        grads = self._gradients()
        return float(nn.utils.get_total_norm(grads)) if grads else 0.0

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self._masters if master.grad is not None]

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters:
            parameter.grad = None  # of a pass that was cut off before it reached the masters

    def _round_masters(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def all_reduce(self, value: Tensor, op: str = "sum") -> Tensor:
        return value.clone()

    def export(self) -> Iterator[tuple[str, Tensor]]:
        return plain_state(self.module)

    def save(self, folder: Path) -> Written:
        self.begin_save(folder, background=False)
        return self.saved()

    def begin_save(self, folder: Path, background: bool = True) -> None:
        if self._saving is not None:
            self._saving.wait()  # nobody asks for its end any more
        held: Iterable[Piece] = pieces(self._trained(), self._optimizer.state, self._fixed())
        if background:
            held = copied(held)
        described = description(self._layout, self.module, self.steps)
        self._saving = Saving(partial(write_state, folder, 0, held, described, self._layout), background)

    def is_saved(self) -> bool:
        return self._saving is None or self._saving.done()

    def saved(self) -> Written:
        saving, self._saving = self._saving, None
        if saving is None:
            raise StepError("nothing is being saved: `begin_save` comes first")
        return saving.result()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = TrainState(folder)
        state.require_fits(self.module, self._dtype)
        state.restore_fixed(self._fixed())
        state.restore(self._trained(), self._optimizer.state, self._step_device)
        self._round_masters()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps = state.steps

    def _trained(self) -> list[Held]:
        masters = {id(p): m for p, m in zip(self._parameters, self._masters, strict=True)}
        named = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        return [Held.whole(name, parameter, masters[id(parameter)]) for name, parameter in named]

    def _fixed(self) -> list[Held]:
        return [Held.whole(name, tensor) for name, tensor in fixed_tensors(self.module).items()]

    def save_pretrained(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase | None, what: Export = "model", ends: Sequence[int] = ()
    ) -> None:
        if problem := not_finite(self.module.named_parameters(), folder):
            raise ModelError(problem)
        write_pretrained(self.module, exported_state(self.module, what), folder, tokenizer, what, ends)

    def close(self) -> None:
        """Nothing to free by hand."""


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().clone().requires_grad_(True)
