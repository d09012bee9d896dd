"""One copy of a prompt for all of its answers: the same numbers from fewer tokens.

The answers of a group stand one after the other behind their prompt, in one line of the model's input:

    prompt | answer 1 | answer 2 | ...

Each answer sees the prompt and itself, and its positions go on from the prompt's end, so every logit is what it
would be in a line of its own. For 16 answers of 4 tokens to a prompt of 6 that is 70 tokens in place of 160.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.batch import Batch, Rows

Line = tuple[int, ...]  # the rows of a batch that stand in one line of the model's input


@dataclass(frozen=True)
class PromptSharing:
    """Which answers stand behind one copy of their prompt: those that cost less there than in lines of their own."""

    hidden_size: int

    @staticmethod
    def of(module: nn.Module) -> PromptSharing:
        """For this model. Raises ConfigError where a mask and positions do not decide what a token sees."""
        config = module.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        attention = getattr(config, "_attn_implementation", None)
        if getattr(module, "_is_stateful", False) or any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
            reason = "a recurrent state"
        elif kinds != {"full_attention"}:
            reason = " and ".join(sorted(kinds))
        elif not hasattr(config, "layer_types") and getattr(config, "sliding_window", None):
            reason = f"a sliding window of {config.sliding_window} tokens"
        elif getattr(config, "alibi", False):
            reason = "ALiBi, which takes positions from the mask"
        elif attention != "sdpa":
            reason = f"the attention kernel {attention!r}"
        elif "position_ids" not in signature(getattr(module, "get_base_model", lambda: module)().forward).parameters:
            reason = "no input for positions"
        else:
            return PromptSharing(config.hidden_size)
        raise ConfigError(
            "learner.share_prompts needs full attention with PyTorch's own kernel (sdpa) and positions as an input; "
            f"{config.model_type} has {reason}; set learner.share_prompts=false"
        )

    def pays(self, line: int, prompt: int, answer: int) -> bool:
        """Is an answer behind a line of so many tokens cheaper than in a line of its own?

        A layer of width H does about 24 H^2 operations a token and 4 H a pair of tokens in attention, and a line with
        a mask pays for all of its pairs: a token is worth 6 H pairs.
        """
        more_pairs = (line + answer) ** 2 - line**2 - (prompt + answer) ** 2
        return more_pairs < 6 * self.hidden_size * prompt


def plan_lines(
    step: Rows, rows: Sequence[int], max_tokens: int, sharing: PromptSharing | None = None, ranks: int = 1
) -> tuple[list[Line], list[int]]:
    """The lines that hold these rows, and the tokens of each; without `sharing` every row has its own.

    Rows with the same prompt go together as long as that pays, at most `max_tokens` a line, and no line has more of
    the answers' tokens than one of `ranks` ranks should compute.
    """
    lengths, prompts, digests = (x.tolist() for x in (step.lengths, step.prompt_lengths, step.prompt_digests))
    if sharing is None:
        return [(row,) for row in sorted(rows)], [lengths[row] for row in sorted(rows)]
    most = math.ceil(sum(lengths[row] - prompts[row] for row in rows) / ranks)
    lines: list[Line] = []
    sizes: list[int] = []
    unfinished: dict[int, int] = {}
    for row in sorted(rows):
        length, answer = prompts[row], lengths[row] - prompts[row]
        prompt = digests[row]
        line = unfinished.get(prompt)
        size = sizes[line] + answer if line is not None else 0
        if line is not None and size <= min(max_tokens, length + most) and sharing.pays(sizes[line], length, answer):
            lines[line] += (row,)
            sizes[line] = size
        else:
            unfinished[prompt] = len(lines)
            lines.append((row,))
            sizes.append(lengths[row])
    return lines, sizes


@dataclass(frozen=True)
class MicroBatch(Batch):
    """The rows of one forward pass, those of a line side by side."""

    answers: tuple[int, ...] = ()  # how many rows each line holds; () where every row has its own

    @staticmethod
    def of(batch: Batch, lines: Sequence[Line]) -> MicroBatch:
        rows = batch.select([row for line in lines for row in line])
        values = {field.name: getattr(rows, field.name) for field in dataclasses.fields(Batch)}
        shared = any(len(line) > 1 for line in lines)
        return MicroBatch(**values, answers=tuple(len(line) for line in lines) if shared else ())

    @property
    def line_tokens(self) -> list[int]:
        """Tokens of each line."""
        if not self.answers:
            return self.lengths.tolist()
        answers_B, line_B = self.lengths - self.prompt_lengths, _line_of(self.answers)
        first_G = torch.searchsorted(line_B, torch.arange(len(self.answers)))
        return self.prompt_lengths[first_G].index_add(0, line_B, answers_B).tolist()


def _line_of(answers: Sequence[int]) -> Tensor:
    """0, 0, 1, 1, 1, ...: the line of each row. [B]"""
    return torch.arange(len(answers)).repeat_interleave(torch.tensor(answers))


@dataclass(frozen=True)
class Layout:
    """`G` lines of `L` tokens, in place of `B` rows of `T`."""

    tokens_GL: Tensor
    positions_GL: Tensor
    visible_G1LL: Tensor  # bool: [.., i, j] says whether token i sees token j
    place_BT: Tensor  # of each row's token in the flattened [G * L]; 0 at padding


def lay_out(micro: MicroBatch) -> Layout:
    """The lines of a micro-batch that shares prompts."""
    B, T = micro.tokens.shape
    lengths_B, prompts_B = micro.lengths, micro.prompt_lengths
    line_B = _line_of(micro.answers)
    answers_B = lengths_B - prompts_B
    before_B = answers_B.cumsum(0) - answers_B  # answer tokens in all earlier rows
    first_B = torch.searchsorted(line_B, line_B)  # the first row of a row's line
    starts_B = prompts_B + before_B - before_B[first_B]
    G, L = len(micro.answers), int((starts_B + answers_B).max())

    t_1T = torch.arange(T)[None]
    in_prompt_BT = t_1T < prompts_B[:, None]
    place_BT = torch.where(in_prompt_BT, t_1T, t_1T - prompts_B[:, None] + starts_B[:, None])
    place_BT = (place_BT + line_B[:, None] * L) * micro.attention_mask
    at = place_BT[micro.attention_mask]

    def laid_out(value_BT: Tensor, empty: int) -> Tensor:
        flat = torch.full((G * L,), empty)
        flat[at] = value_BT[micro.attention_mask]  # the rows of a line write the same prompt to the same places
        return flat.view(G, L)

    # 0: prompt, 1 and more: the row of an answer, -1: padding
    part_BT = torch.where(in_prompt_BT, 0, torch.arange(1, B + 1)[:, None])
    part_GL = laid_out(part_BT, -1)
    seen_G1L, by_GL1 = part_GL[:, None, :], part_GL[:, :, None]
    visible_GLL = ((seen_G1L == 0) | (seen_G1L == by_GL1)) & torch.ones(L, L, dtype=torch.bool).tril()
    visible_GLL |= torch.eye(L, dtype=torch.bool)  # padding sees itself: a softmax over nothing is NaN
    return Layout(
        tokens_GL=laid_out(micro.tokens, 0),
        positions_GL=laid_out(t_1T.expand(B, T), 0),
        visible_G1LL=visible_GLL[:, None],
        place_BT=place_BT,
    )


def shared_logits(model: Callable[..., Any], micro: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """[P, V] logits of all places in all lines, and the place of each row's token among them, [B, T]."""
    layout = lay_out(micro)
    logits_GLV = model(
        input_ids=layout.tokens_GL.to(device),
        attention_mask=layout.visible_G1LL.to(device),
        position_ids=layout.positions_GL.to(device),
        use_cache=False,
    ).logits
    return logits_GLV.flatten(0, 1), layout.place_BT.to(device)
