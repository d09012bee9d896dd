"""Functions that a program passes as rewards, on a worker."""

from __future__ import annotations

import threading

import pytest

from rlhf_ray.config.rewards import RewardConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.remote.given import require_portable


def test_what_cannot_be_copied_is_refused_with_its_name():
    weight, lock = 2.0, threading.Lock()

    def locked(completions):
        with lock:
            return [weight for _ in completions]

    require_portable([
        RewardConfig(function=lambda completions: [weight for _ in completions]), RewardConfig(function="math"),
    ])  # fmt: skip
    with pytest.raises(ConfigError, match="reward locked: executor=ray sends it to a worker, and it cannot be pickled"):
        require_portable([RewardConfig(function=locked)])
