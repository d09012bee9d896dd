"""Cases to plan: named shapes on named devices, counted once."""

from __future__ import annotations

from functools import cache

import pytest

from rlhf_ray.config.load import config_of
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.scale.case import Case
from rlhf_ray.scale.make_case import Wishes, make_case, size_of_shape
from rlhf_ray.scale.shapes import require_shape


@cache
def counted(name):
    return size_of_shape(require_shape(name, "no such shape"))


def run_config(*overrides: str) -> RunConfig:
    tree = {"data": {"path": "task:arithmetic"}, "rewards": [{"function": "exact_answer"}], "model": {}}
    return config_of(tree, ["model.path=qwen2-7b", *overrides], RunConfig, source="test")


@pytest.fixture
def case_of():
    """case_of(model, devices, overrides..., device=...)"""

    def make(model: str, devices: int, *overrides: str, device: str = "h100", **wishes: object) -> Case:
        config = run_config(f"model.path={model}", *overrides)
        shape = require_shape(model, "no such shape")
        size = counted(model) if config.model.lora is None else size_of_shape(shape, config.model.lora)
        return make_case(config, shape, size, Wishes(device, devices, **wishes))

    return make
