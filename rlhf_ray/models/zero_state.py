"""Where DeepSpeed's optimisers keep a network in training: which elements of which parameter this rank holds.

ZeRO 0 has AdamW over whole parameters on every rank. ZeRO 1 and 2 lay all parameters of a group end to end and cut that
into as many equal pieces as there are ranks; ZeRO 3 cuts every parameter. Both pad at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rlhf_ray.models.train_state import Held, fixed_tensors, shapes_of, trained_shapes


def trained_here(module: nn.Module, optimizer: Any, stage: int, rank: int, ranks: int = 1) -> Iterator[Held]:
    """The part of each trained parameter whose master and moments this rank holds.

    `ranks`: what every rank holds whole (ZeRO 0) is dealt out among so many; 1: each gets all of it.
    """
    shapes = trained_shapes(module)
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for place, (name, parameter) in enumerate(trained):
        if stage == 0:
            if place % ranks == rank % ranks:
                yield Held.whole(name, parameter)
        elif stage == 3:
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            if (held := _cut(name, shapes[name], flat, rank, offset, length)) is not None:
                yield held
        elif (place := parameter._hp_mapping) is not None:
            flat = _partitions(optimizer)[place.param_group_index]
            inside, own = place.lp_fragment_address, place.hp_fragment_address
            yield Held(name, shapes[name], flat, inside.start, own.start, own.numel)


def fixed_here(module: nn.Module, rank: int, ranks: int = 1) -> Iterator[Held]:
    """As `trained_here`, of what is not trained: pieces of frozen parameters with ZeRO 3, else all whole."""
    tensors = fixed_tensors(module)
    shapes = shapes_of(tensors)
    for place, (name, tensor) in enumerate(tensors.items()):
        cut = getattr(tensor, "ds_tensor", None)
        if cut is None:
            if place % ranks == rank % ranks:
                yield Held.whole(name, tensor)
        elif (held := _cut(name, shapes[name], cut, rank, 0, cut.numel())) is not None:
            yield held


def show_masters(optimizer: Any, stage: int) -> None:
    """Give the network the masters that this rank's optimiser holds, as after a step. Collective."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        # Small parameters are whole between steps: cut, changed and made whole again.
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


def _partitions(optimizer: Any) -> list[Tensor]:
    """Float32 pieces by parameter group, of ZeRO 1 and 2, and of bfloat16 with ZeRO 1, which is another class."""
    own = getattr(optimizer, "single_partition_of_fp32_groups", None)
    return optimizer.fp32_groups_flat_partition if own is None else own


def _cut(name: str, shape: tuple[int, ...], flat: Tensor, rank: int, offset: int, length: int) -> Held | None:
    """ZeRO 3's piece without its padding; None where there is nothing else in it."""
    start = rank * length
    length = min(length, math.prod(shape) - start)
    return Held(name, shape, flat, start, offset, length) if length > 0 else None
