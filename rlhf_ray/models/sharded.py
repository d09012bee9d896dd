"""A frozen network that several ranks hold together: each has a part of every weight, and a layer is made whole for as
long as it computes (ZeRO-3, Rajbhandari et al. 2020, without training)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from rlhf_ray.errors import ModelError
from rlhf_ray.models.deepspeed_library import deepspeed_library, quiet
from rlhf_ray.models.devices import with_index
from rlhf_ray.models.process_group import join_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

Item = TypeVar("Item")
Found = TypeVar("Found")


class Sharded:
    """
    Args:
        whole: the network with its weights, in the host's memory; called on rank 0 alone.
        empty: the same network without weights, on the meta device; called on the others.
        device: where it computes.
        dtype: of the weights.
        rank, world_size, address, port, timeout_s: see `roles.factory.Rank`.
    Raises:
        ModelError: `empty` is another network than `whole`.
    """

    def __init__(
        self, whole: Callable[[], PreTrainedModel], empty: Callable[[], PreTrainedModel], *,
        device: torch.device | str, dtype: torch.dtype, rank: int, world_size: int, address: str, port: int | None,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.device = with_index(torch.device(device))
        self.rank, self.world_size = join_ranks(self.device, rank, world_size, address, port, timeout_s)
        module = (whole if rank == 0 else empty)().eval().requires_grad_(False)
        if rank:
            module.to_empty(device="cpu")  # the system gives no memory before something is written there
            module.tie_weights()
        self._agree(module)
        _spread(module, self.device, _keep_shares(dtype))
        self._engine = _reading_engine(module, dtype)
        self.module: PreTrainedModel = module

    def __call__(self, **inputs: Any) -> ModelOutput:
        """Collective: every rank makes as many forward passes, each with rows of its own."""
        return self._engine(**inputs)

    def map(self, compute: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """`compute`, which makes one forward pass, of each item, on one of the ranks; all of them get all results.

        Collective: every rank is given the same items. One that has run out computes the last one again.
        """
        rounds, last = math.ceil(len(items) / self.world_size), len(items) - 1
        own = [compute(items[min(number * self.world_size + self.rank, last)]) for number in range(rounds)]
        found = [own] * self.world_size
        torch.distributed.all_gather_object(found, own)
        return [found[place % self.world_size][place // self.world_size] for place in range(len(items))]

    @property
    def held_bytes(self) -> int:
        """Of this rank's shares. What is too small to be worth a collective it also holds whole."""
        held = (parameter.ds_tensor for parameter in self.module.parameters())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _agree(self, module: nn.Module) -> None:
        """All ranks raise together: one that raised alone would leave the others waiting."""
        own = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(module)]
        found = [own] * self.world_size
        torch.distributed.all_gather_object(found, own)
        for other in found:
            if other != found[0]:
                differs = next((b for a, b in zip(found[0], other, strict=False) if a != b), "their number")
                raise ModelError(
                    f"the config makes another network than rank 0 has loaded (another: {differs}); hold this model in "
                    "one process"
                )


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, tied ones once."""
    return [*module.named_parameters(), *module.named_buffers()]


def _spread(module: nn.Module, device: torch.device, keep: Callable[[nn.Module], None]) -> None:
    """Rank 0's values to all ranks; of a module's parameters each keeps its share, before the next ones come."""
    seen: set[int] = set()
    for part in module.modules():
        own = [p for p in part.parameters(recurse=False) if id(p) not in seen]
        for tensor in (*own, *(b for b in part.buffers(recurse=False) if id(b) not in seen)):
            seen.add(id(tensor))
            tensor.data = tensor.data.to(device)
            torch.distributed.broadcast(tensor.data, 0)
        if own:
            keep(_only(own))


def _only(parameters: list[nn.Parameter]) -> nn.Module:
    """A module that has these parameters and no others below it."""
    holder = nn.Module()
    for number, parameter in enumerate(parameters):
        holder.register_parameter(str(number), parameter)
    return holder


def _keep_shares(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """What makes whole parameters this rank's shares of them (ZeRO-3). Collective, but nothing is sent."""
    deepspeed, config = deepspeed_library(), _reading_config(dtype)
    return lambda module: deepspeed.zero.Init(module=module, config_dict_or_path=config)


def _reading_engine(module: nn.Module, dtype: torch.dtype) -> Any:
    """DeepSpeed's engine of a module whose parameters are shares, without an optimiser. Collective."""
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    deepspeed, config = deepspeed_library(), _reading_config(dtype)
    with quiet():
        engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
    for part, name, buffer in buffers:  # it has cast them, and rotary frequencies must not be rounded
        part._buffers[name] = buffer
    engine.eval()
    return engine


def _reading_config(dtype: torch.dtype) -> dict[str, Any]:
    # By default whatever is used again within the next 10^9 elements stays whole, which may be the model.
    zero = {"stage": 3, "stage3_max_reuse_distance": 0}
    return {"train_micro_batch_size_per_gpu": 1, "steps_per_print": None, "zero_optimization": zero} | (
        {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}
    )
