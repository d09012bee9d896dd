"""`rlhf-ray plan`: what a user types, and what is printed."""

import json

import pytest
import yaml

pytestmark = pytest.mark.slow


def test_a_model_by_name(rlhf_ray):
    status, out, _ = rlhf_ray("plan", "--model", "qwen2-0.5b", "--devices", "8", "--device", "a100",
                              "rollout.prompts_per_step=64", "--answer-tokens", "200")  # fmt: skip
    assert status == 0
    assert out.startswith("# qwen2-0.5b (494M parameters), grpo, on 8 x A100 (79 GiB; 1 machine)\n")
    for part in ("64 prompts x 8 answers, on average 1024 + 200 tokens\n", "recommended: ", "memory of a device, GiB",
                 "time of a step, s", "why\n", "rlhf-ray rl CONFIG.yaml executor=ray", "assumed: 35% of"):  # fmt: skip
        assert part in out, part


def test_a_config_and_json(rlhf_ray, tmp_path, tiny_tree):
    path, rates = tmp_path / "run.yaml", tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    rates.write_text("price_per_device_hour: 2.5\n")
    told = ("device=cuda", "executor=ray", "steps=7", "--devices", "2", "--rates", str(rates), "--json")
    status, out, _ = rlhf_ray("plan", str(path), *told)
    assert status == 0
    plan = json.loads(out)
    assert plan["model"]["parameters"] < 10_000_000 and plan["devices"]["count"] == 2
    assert plan["recommended"]["device_hours"] == pytest.approx(7 * plan["recommended"]["device_hours_a_step"])
    assert plan["written"]["does_not_fit"] == [] and plan["rates"]["price_per_device_hour"] == 2.5
    status, out, _ = rlhf_ray("plan", str(path), "device=cuda", "--devices", "2", "--json")
    local = json.loads(out)
    assert local["recommended"]["settings"]["executor"] == "ray" and local["written"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "plan needs a run"),
        (("--model", "llama-70b"), "70.6B parameters do not fit 1 x H100"),
        (("--model", "llama-80b"), "did you mean llama-8b?"),
        (("--model", "qwen2-7b", "rollout.group_sise=3"), "group_size"),
    ],
)
def test_refusals_are_one_paragraph_and_status_2(rlhf_ray, arguments, said):
    status, _, err = rlhf_ray("plan", *arguments)
    assert status == 2 and said in err and "Traceback" not in err
