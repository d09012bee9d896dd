"""Numbers of a set of answers: the same during training (`loops/evaluate.py`) and in `rlhf-ray eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlhf_ray.data.words import Chinese
from rlhf_ray.evaluation.text import distinct_n, distinct_ngrams
from rlhf_ray.roles.batch import Rows
from rlhf_ray.rollout.measures import function_means


def reward_metrics(
    score_B: Tensor, by_function: Mapping[str, Tensor], *, right: str | None = None, right_at: float = 1.0
) -> dict[str, float]:
    """`reward` (the weighted sum), `reward/<name>` of each function, and `accuracy`: the share of right answers.

    An answer is right where the reward `right` is at least `right_at`; without one there is no accuracy.
    A number is NaN where a reward function did not judge the row, or failed and its policy lets the run go on without
    that row: such rows do not count.
    """
    result = {"reward": float(score_B.nanmean()), **function_means(by_function)}
    if right is not None and f"reward/{right}" in result:
        scored_B = by_function[right][~by_function[right].isnan()]
        result["accuracy"] = float((scored_B >= right_at).to(scored_B.dtype).mean())
    return result


def text_metrics(
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    rows: Rows,
    *,
    largest_n: int = 2,
    chinese: Chinese = "characters",
) -> dict[str, float]:
    """`response_len` (tokens, EOS included), `truncated_frac`, `distinct_1` to `distinct_<largest_n>` of words, and
    `distinct_1_tokens` ... of token ids, EOS included.
    """
    sizes = range(1, largest_n + 1)
    return {
        "response_len": float(rows.response_lengths.mean()),
        "truncated_frac": float(rows.truncated.mean()),
        **{f"distinct_{n}": distinct_n(completions, n, chinese=chinese) for n in sizes},
        **{f"distinct_{n}_tokens": distinct_ngrams(completion_ids, n) for n in sizes},
    }
