from __future__ import annotations

import torch

from rlhf_ray.sync.export import ParamMeta, describe, module_pairs, tied_names, with_tied_names


def test_tied_weight_is_written_under_both_names(make_tied):
    module = make_tied()
    assert tied_names(module) == {"embed.weight": ("head.weight",)}
    names = [name for name, _ in module_pairs(module)]
    assert names == ["embed.weight", "body.weight", "body.bias", "head.weight"]


def test_with_tied_names_adds_what_the_source_left_out_and_repeats_nothing(make_tied):
    module = make_tied()
    alone = [(name, p.detach()) for name, p in module.named_parameters()]
    assert [n for n, _ in alone] == ["embed.weight", "body.weight", "body.bias"]
    once = dict(with_tied_names(alone, tied_names(module)))
    assert list(once) == ["embed.weight", "head.weight", "body.weight", "body.bias"]
    assert once["head.weight"] is once["embed.weight"]
    both = list(with_tied_names(module_pairs(module), tied_names(module)))
    assert len(both) == len({name for name, _ in both}) == 4


def test_describe():
    pairs = [("a", torch.zeros(2, 3)), ("b", torch.zeros((), dtype=torch.bfloat16))]
    assert describe(pairs) == [ParamMeta("a", torch.float32, (2, 3)), ParamMeta("b", torch.bfloat16, ())]
