from __future__ import annotations

import pytest
import torch

from rlhf_ray.loops.export import export
from rlhf_ray.models.loading import load_policy
from rlhf_ray.start.rl import run_rl


class Role:
    def export_model(self, folder):
        (folder / "model").touch()

    def export_adapter(self, folder):
        (folder / "adapter").touch()


def test_an_adapter_where_one_is_named(tmp_path):
    export(Role(), tmp_path / "model", None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export(Role(), tmp_path / "model", tmp_path / "adapter")
    assert (tmp_path / "model" / "model").is_file() and (tmp_path / "adapter" / "adapter").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.slow
def test_a_lora_run_leaves_the_adapters_of_its_last_and_of_its_best_policy(tiny_config, tmp_path):
    """On the policy that the run began with, each computes what the merged model beside it does."""
    from peft import PeftModel

    run = tmp_path / "run"
    settings = ("steps=2", "model.lora.r=2", "learner.lr=0.02", "eval.every=1", "eval.best_by=reward")
    run_rl(tiny_config(*settings), run)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        began = load_policy(run / "start")(ids).logits
        for model, adapter in (("model", "adapter"), ("best_model", "best_adapter")):
            merged = load_policy(run / model)(ids).logits
            adapted = PeftModel.from_pretrained(load_policy(run / "start"), run / adapter).eval()
            torch.testing.assert_close(adapted(ids).logits, merged, atol=1e-5, rtol=0)
        assert (load_policy(run / "model")(ids).logits - began).abs().max() > 1e-3
