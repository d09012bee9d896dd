"""What a step's answers and their rewards look like, by the metrics' final names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from rlhf_ray.data.stream import Part
from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Scores


def rollout_metrics(rows: Rows, scores: Scores, step: int) -> dict[str, float]:
    """Of these rows, all of them judged; `step`: of the learner that learns from them."""
    score_B = scores.score
    metrics = {
        "reward/mean": float(score_B.mean()),
        "reward/std": float(score_B.std(correction=0)),
        "reward/min": float(score_B.min()),
        "reward/max": float(score_B.max()),
        "response_len/mean": float(rows.response_lengths.mean()),
        "response_len/max": float(rows.response_lengths.max()),
        "truncated_frac": float(rows.truncated.mean()),
        **staleness(rows, step),
    }
    return metrics | function_means(scores.by_function) | _group_metrics(rows.prompt_id, score_B.double().numpy())


def staleness(rows: Rows, step: int) -> dict[str, float]:
    """Weight versions between the policy that wrote each row and the one that learns from it."""
    behind = step - rows.weight_version[rows.weight_version >= 0]
    return {
        "staleness/mean": int(behind.sum()) / max(1, len(behind)),
        "staleness/max": float(behind.max(initial=0)),
    }


def function_means(by_function: Mapping[str, Tensor]) -> dict[str, float]:
    """`reward/<name>`: each function's mean over the rows that it judged; absent where it judged none."""
    return {
        f"reward/{name}": float(value_B.nanmean())
        for name, value_B in by_function.items()
        if not value_B.isnan().all()
    }


def source_metrics(
    parts: Sequence[Part], epochs: Sequence[float], names: Sequence[str], rows: Rows, scores: Scores, step: int
) -> dict[str, float]:
    """The same metrics of each source by itself, and how often its prompts have been gone through so far.

    Args:
        parts, epochs: [sources]
        names: [B] the source of each row; empty where there is only one.
    """
    metrics: dict[str, float] = {}
    for part, passed in zip(parts, epochs, strict=True):
        own = [row for row, name in enumerate(names) if name == part.name]
        found = {"count": float(len(own)), "epochs": passed}
        if own:
            found |= rollout_metrics(rows.select(own), scores.select(own), step)
        metrics |= {f"source/{part.name}/{name}": x for name, x in found.items() if not name.startswith("stale")}
    return metrics


def _group_metrics(prompt_B: np.ndarray, score_B: np.ndarray) -> Mapping[str, float]:
    """Shares of groups in which every answer earns 1 or more, every answer 0 or less, or neither; in which all earn the
    same; and how far a group's answers differ.
    """
    _, group_B, size_G = np.unique(prompt_B, return_inverse=True, return_counts=True)
    order, first_G = np.argsort(group_B, kind="stable"), np.cumsum(size_G) - size_G
    group_B, score_B = group_B[order], score_B[order]
    low_G, high_G = np.minimum.reduceat(score_B, first_G), np.maximum.reduceat(score_B, first_G)
    mean_G = np.add.reduceat(score_B, first_G) / size_G
    variance_G = np.add.reduceat((score_B - mean_G[group_B]) ** 2, first_G) / size_G
    correct, wrong = float((low_G >= 1).mean()), float((high_G <= 0).mean())
    return {
        "groups/all_correct": correct,
        "groups/all_wrong": wrong,
        "groups/mixed": 1 - correct - wrong,
        "groups/same": float((low_G == high_G).mean()),
        "reward/std_in_group": float(np.sqrt(variance_G).mean()),
    }
