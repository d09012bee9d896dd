"""One copy of a prompt for all of its answers: the same numbers from fewer tokens.

The answers of a group stand one after the other behind their prompt in a packed row:

    prompt | answer 1 | answer 2 | ...

Each answer sees the prompt and itself, and its positions go on from the prompt's end, so every logit is what it
would be in a row of its own. For 16 answers of 4 tokens to a prompt of 6 that is 70 tokens in place of 160.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.batch import Batch
from rlhf_ray.errors import ConfigError


def plan_packs(batch: Batch, rows: Sequence[int], max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Which rows share a packed row, and how many tokens each packed row has.

    Rows with the same prompt go together as long as they fit into `max_tokens`; with 0 every row is alone.
    """
    lengths, prompts = batch.lengths.tolist(), batch.prompt_lengths.tolist()
    packs: list[list[int]] = []
    sizes: list[int] = []
    unfinished: dict[tuple[int, ...], int] = {}
    for row in sorted(rows):
        prompt = tuple(batch.tokens[row, : prompts[row]].tolist()) if max_tokens else ()
        answer = lengths[row] - prompts[row]
        pack = unfinished.get(prompt)
        if pack is not None and sizes[pack] + answer <= max_tokens:
            packs[pack].append(row)
            sizes[pack] += answer
        else:
            unfinished[prompt] = len(packs)
            packs.append([row])
            sizes.append(lengths[row])
    return packs, sizes


def rows_of(packs: Sequence[Sequence[int]], chosen: Sequence[int]) -> list[int]:
    """The rows of some packs, those of a pack side by side."""
    return [row for number in chosen for row in packs[number]]


def pack_numbers(batch: Batch, packs: Sequence[Sequence[int]]) -> Tensor:
    """What `Batch.pack` holds for these packs. [B]"""
    number_B = torch.full((len(batch),), -1)
    for number, rows in enumerate(packs):
        number_B[list(rows)] = number
    return number_B


def packed_sizes(micro: Batch) -> list[int]:
    """Tokens of each row that the model will see."""
    if micro.pack is None:
        return micro.lengths.tolist()
    number_B = _numbered(micro)
    answers_G = torch.zeros(int(number_B[-1]) + 1, dtype=torch.long)
    answers_G.index_add_(0, number_B, micro.lengths - micro.prompt_lengths)
    return (answers_G + micro.prompt_lengths[torch.searchsorted(number_B, torch.arange(len(answers_G)))]).tolist()


def _numbered(micro: Batch) -> Tensor:
    """Which packed row each row is in, 0, 0, 1, 1, 1, ... [B]"""
    return micro.pack.unique_consecutive(return_inverse=True)[1]


@dataclass(frozen=True)
class Packed:
    """`G` packed rows of `L` tokens, in place of `B` rows of `T`."""

    tokens_GL: Tensor
    positions_GL: Tensor
    visible_G1LL: Tensor  # bool: [.., i, j] says whether token i sees token j
    where_BT: Tensor  # the place of each row's token in the flattened [G * L]; 0 at padding


def pack(micro: Batch) -> Packed:
    """The packed rows that `micro.pack` names; the rows of a pack stand side by side in `micro`."""
    B, T = micro.tokens.shape
    lengths_B, prompts_B = micro.lengths, micro.prompt_lengths
    pack_B = _numbered(micro)
    answers_B = lengths_B - prompts_B
    before_B = answers_B.cumsum(0) - answers_B  # answer tokens in all earlier rows
    first_B = torch.searchsorted(pack_B, pack_B)  # the first row of a row's pack
    starts_B = prompts_B + before_B - before_B[first_B]
    G, L = int(pack_B[-1]) + 1, int((starts_B + answers_B).max())

    t_1T = torch.arange(T)[None]
    in_prompt_BT = t_1T < prompts_B[:, None]
    place_BT = torch.where(in_prompt_BT, t_1T, t_1T - prompts_B[:, None] + starts_B[:, None])
    where_BT = (place_BT + pack_B[:, None] * L) * micro.attention_mask
    at = where_BT[micro.attention_mask]

    def laid_out(value_BT: Tensor, empty: int) -> Tensor:
        flat = torch.full((G * L,), empty)
        flat[at] = value_BT[micro.attention_mask]
        return flat.view(G, L)

    # 0: prompt, 1 and more: the row of an answer, -1: padding
    part_BT = torch.where(in_prompt_BT, 0, torch.arange(1, B + 1)[:, None])
    part_GL = laid_out(part_BT, -1)
    seen_G1L, by_GL1 = part_GL[:, None, :], part_GL[:, :, None]
    visible_GLL = ((seen_G1L == 0) | (seen_G1L == by_GL1)) & torch.ones(L, L, dtype=torch.bool).tril()
    visible_GLL |= torch.eye(L, dtype=torch.bool)  # padding sees itself: a softmax over nothing is NaN
    return Packed(
        tokens_GL=laid_out(micro.tokens, 0),
        positions_GL=laid_out(t_1T.expand(B, T), 0),
        visible_G1LL=visible_GLL[:, None],
        where_BT=where_BT,
    )


def packed_logits(model: Callable[..., Any], micro: Batch, device: torch.device) -> Tensor:
    """[B, T, V] logits, as from rows that each have their own prompt."""
    packed = pack(micro)
    logits_GLV = model(
        input_ids=packed.tokens_GL.to(device),
        attention_mask=packed.visible_G1LL.to(device),
        position_ids=packed.positions_GL.to(device),
        use_cache=False,
    ).logits
    return logits_GLV.flatten(0, 1)[packed.where_BT.to(device)]


def require_packable(module: nn.Module) -> None:
    """Raises ConfigError for a model in which a token sees others than those that the mask allows."""
    config = module.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    attention = getattr(config, "_attn_implementation", None)
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())
    if recurrent or kinds != {"full_attention"} or attention != "sdpa":
        raise ConfigError(
            f"learner.shared_prompt_tokens needs full attention with PyTorch's own kernel (sdpa); {config.model_type} "
            f"has {'a recurrent state' if recurrent else f'{sorted(kinds)} with {attention}'}; "
            "set learner.shared_prompt_tokens=0"
        )
