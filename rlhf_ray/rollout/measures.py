"""What a step's answers and their rewards look like, by the metrics' final names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from statistics import fmean

import torch
from torch import Tensor

from rlhf_ray.data.stream import Part
from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Scores


def rollout_metrics(rows: Rows, scores: Scores, step: int) -> dict[str, float]:
    """Of these rows, all of them judged; `step`: of the learner that learns from them."""
    score_B, response_B = scores.score, torch.tensor(rows.response_lengths, dtype=torch.float32)
    metrics = {
        "reward/mean": float(score_B.mean()),
        "reward/std": float(score_B.std(correction=0)),
        "reward/min": float(score_B.min()),
        "reward/max": float(score_B.max()),
        "response_len/mean": float(response_B.mean()),
        "response_len/max": float(response_B.max()),
        "truncated_frac": sum(rows.truncated) / len(rows),
        **staleness(rows, step),
    }
    return metrics | function_means(scores.by_function) | _group_metrics(rows.prompt_id, score_B.tolist())


def staleness(rows: Rows, step: int) -> dict[str, float]:
    """Weight versions between the policy that wrote each row and the one that learns from it."""
    behind = [step - version for version in rows.weight_version if version >= 0]
    return {
        "staleness/mean": sum(behind) / max(1, len(behind)),
        "staleness/max": float(max(behind, default=0)),
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


def _group_metrics(prompt_ids: Sequence[int], scores: Sequence[float]) -> Mapping[str, float]:
    """Shares of groups in which every answer earns 1 or more, every answer 0 or less, or neither; in which all earn the
    same; and how far a group's answers differ.
    """
    groups: dict[int, list[float]] = {}
    for prompt, score in zip(prompt_ids, scores, strict=True):
        groups.setdefault(prompt, []).append(score)
    correct = sum(min(group) >= 1 for group in groups.values()) / len(groups)
    wrong = sum(max(group) <= 0 for group in groups.values()) / len(groups)
    return {
        "groups/all_correct": correct,
        "groups/all_wrong": wrong,
        "groups/mixed": 1 - correct - wrong,
        "groups/same": sum(min(group) == max(group) for group in groups.values()) / len(groups),
        "reward/std_in_group": fmean(map(_std, groups.values())),
    }


def _std(values: Sequence[float]) -> float:
    # Fifty times faster than statistics.pstdev, which reckons in fractions, and equal to it but for the last digit.
    mean = fsum(values) / len(values)
    return sqrt(fsum([(value - mean) ** 2 for value in values]) / len(values))
