"""pass@k: how likely one of k answers to a problem is right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_ray.errors import ConfigError


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the unbiased estimate from n samples of which c are right (Chen et al., 2021, eq. 1).

    Raises ConfigError for k > n: there is no estimate from fewer samples than k.
    """
    if k > samples:
        raise ConfigError(f"pass@{k} cannot be estimated from {samples} answers a prompt; sample at least {k}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)  # integers: exact, whatever n


def mean_pass_at_k(right_by_prompt: Sequence[Sequence[bool]], k: int) -> float:
    """The mean over problems; one list of right (True) and wrong answers a problem."""
    return sum(pass_at_k(len(right), sum(right), k) for right in right_by_prompt) / len(right_by_prompt)
