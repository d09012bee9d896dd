from __future__ import annotations

import torch

from rlhf_ray.sync.export import ParamMeta, describe


def test_describe():
    pairs = [("a", torch.zeros(2, 3)), ("b", torch.zeros((), dtype=torch.bfloat16))]
    assert describe(pairs) == [ParamMeta("a", torch.float32, (2, 3)), ParamMeta("b", torch.bfloat16, ())]
