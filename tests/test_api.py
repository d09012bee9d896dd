"""`import rlhf_ray`: what a program or a notebook calls."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_ray
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError, DataError, RewardError, RlhfRayError
from tests.steps import one_step

SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


@pytest.fixture
def tiny(tiny_tree):
    """Settings of a run over rows of its own."""
    return {**tiny_tree, "data": {"max_prompt_tokens": 16}, "eval": {}, "rewards": []}


def first_digit(completions, answer):
    return [float(text[:1] == right[:1]) for text, right in zip(completions, answer, strict=True)]


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, rlhf_ray; assert rlhf_ray.__version__; assert set(rlhf_ray.__all__) <= set(dir(rlhf_ray))\n"
        "light = sorted(sys.modules.keys() & {'pydantic', 'rlhf_ray.api'})\n"
        "[getattr(rlhf_ray, name) for name in rlhf_ray.__all__]\n"
        "print(light, sorted(sys.modules.keys() & {'torch', 'transformers', 'datasets', 'ray', 'vllm', 'deepspeed'}))"
    )
    root = Path(rlhf_ray.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert done.stdout == "[] []\n", done.stdout + done.stderr
    with pytest.raises(AttributeError, match="no attribute 'grpo'"):
        _ = rlhf_ray.grpo


def test_a_config_of_each_command_with_its_own_checks(tiny_tree):
    assert isinstance(rlhf_ray.load_config(tiny_tree, steps=3), RunConfig)
    assert rlhf_ray.load_config("shipped:grpo_arithmetic.yaml", steps=3).steps == 3
    assert rlhf_ray.load_config(model={"path": "m"}, data={"path": "d.jsonl"}, command="dpo").dpo.kind == "sigmoid"
    with pytest.raises(ConfigError, match="group_size=1"):
        rlhf_ray.load_config(tiny_tree, rollout={"group_size": 1})
    with pytest.raises(ConfigError, match="command='ppo' has no config; choose one of rl, sft"):
        rlhf_ray.load_config(tiny_tree, "ppo")


def test_a_config_object_is_checked_before_anything_is_computed(tiny_tree, tmp_path):
    config = RunConfig(**tiny_tree)
    for wrong, said in (({"steps": -3}, "steps: input should be greater"), ({"stepz": 3}, "did you mean steps")):
        with pytest.raises(ConfigError, match=said):
            rlhf_ray.rl(config.model_copy(update=wrong), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_lambda_as_reward_and_a_list_of_dicts_as_data(tiny, tmp_path):
    environment, seen, told = dict(os.environ), [], []

    async def shorter(completions):
        seen.append(len(completions))
        return [-len(text) for text in completions]

    def run(folder: str):
        return rlhf_ray.rl(
            tiny,
            prompts=SUMS,
            rewards=[lambda completions, answer: first_digit(completions, answer), (shorter, 0.5)],
            steps=2,
            observers=[lambda record: told.append((record.step, record.metrics["reward/mean"]))],
            run_dir=tmp_path / folder,
        )

    result = run("a")
    assert [row["step"] for row in result.metrics] == [1, 2]
    assert told == [(row["step"], row["reward/mean"]) for row in result.metrics]
    row = result.rollouts(2)[0]
    assert row["rewards"].keys() == {"lambda", "shorter"}
    # Weighted: 1 x the first + 0.5 x the second.
    assert row["reward"] == pytest.approx(row["rewards"]["lambda"] + 0.5 * row["rewards"]["shorter"])
    assert row["rewards"]["shorter"] == -len(row["completion"])
    # A tenth of 25 rows is held out and answered before and after; 2 prompts x 2 answers are judged at each step.
    assert [sample["prompt"] for sample in result.samples] == ["4+3=", "4+4="]
    assert seen == [2, 4, 4, 2]
    assert result.samples[0].keys() == {"prompt", "before", "after", "reward_before", "reward_after"}
    assert (result.model / "config.json").is_file() and result.checkpoints == [tmp_path / "a/checkpoints/step_2"]
    assert result.adapter is None and result.best_model is None
    assert result.summary["status"] == "finished" and "2 steps" in repr(result)
    with pytest.raises(DataError, match="no completions of step 9"):
        result.rollouts(9)
    again = run("b")
    norms = [[row["grad_norm"] for row in run.metrics] for run in (result, again)]
    assert norms[0] == norms[1], "twice in one process"
    assert dict(os.environ) == environment


@pytest.mark.slow
def test_what_a_function_raises_is_said_and_ctrl_c_is_not_swallowed(tiny, tmp_path):
    def broken(completions):
        raise ValueError("no scores today")

    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(RewardError, match="(?s)broken.*no scores today"):
        rlhf_ray.rl(tiny, prompts=SUMS, rewards=broken, run_dir=tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        rlhf_ray.rl(tiny, prompts=SUMS, rewards=interrupted, run_dir=tmp_path / "b")
    with pytest.raises(RlhfRayError, match=r"rows\[0\]"):
        rlhf_ray.rl(tiny, prompts=[{"prompt": 3}] * 9, rewards=first_digit, run_dir=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_roles_without_the_loop(tiny, tmp_path):
    with rlhf_ray.open_roles(tiny, prompts=SUMS, rewards=first_digit) as session:
        roles, requests = session.roles, session.requests(0)
        assert [request.prompt_id for request in requests] == [0, 0, 1, 1], "two answers to each of two prompts"
        assert (len(session.prompts), len(session.held_out)) == (23, 2)
        roles.learner.push_weights(0)
        batch = roles.generator.generate(requests, session.sampling)
        again = roles.generator.generate(session.requests(0), session.sampling)
        assert (batch.tokens == again.tokens).all()
        scores = roles.reward.score(batch)
        batch = batch.replace(score=scores.score)
        estimate = roles.advantages.estimate(batch, 0.0)
        one_step(roles.learner, batch.replace(**estimate.columns), 0, 0.0)
        assert roles.learner.push_weights(1) and roles.generator.version == 1
        assert (session.export(tmp_path / "mine") / "model.safetensors").is_file()
    run = rlhf_ray.rl(tiny, prompts=SUMS, rewards=first_digit, run_dir=tmp_path / "run")
    assert [row["completion"] for row in run.rollouts(1)] == [text for _, text in roles.reward.score(batch, 4).texts]
    with pytest.raises(DataError, match="no 'train' among 'test'"), rlhf_ray.open_roles(
        tiny, prompts={"test": SUMS}, rewards=first_digit
    ):
        pass


@pytest.mark.slow
def test_a_model_and_a_tokenizer_as_objects_are_copied_and_a_run_goes_on_from_them(tiny, tmp_path):
    from rlhf_ray.models.scratch import build_scratch
    from rlhf_ray.models.tokenizers import build_tokenizer

    tokenizer = build_tokenizer("char", ["0123456789+="], max_length=32)
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 32, "tie_embeddings": True}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_scratch("qwen2", vocab_size=len(tokenizer), seed=3, **sizes, **ends)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"prompts": SUMS, "rewards": first_digit, "model": model, "tokenizer": tokenizer}
    settings = {"learner": {"lr": 1e-2}, "run_dir": tmp_path / "run"}
    result = rlhf_ray.rl({**tiny, "model": {}}, **given, **settings)
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())
    started = type(model).from_pretrained(tmp_path / "run/start").state_dict()
    assert all((before[name] == tensor).all() for name, tensor in started.items())
    trained = type(model).from_pretrained(result.model).state_dict()
    assert any((before[name] != tensor).any() for name, tensor in trained.items())
    longer = rlhf_ray.rl({**tiny, "model": {}}, **given, **settings, steps=2, resume=True)
    assert longer.summary["steps"] == 2 and longer.run_dir == result.run_dir


@pytest.mark.slow
def test_sft_a_reward_model_dpo_and_their_comparison(tiny_tree, tmp_path):
    datasets = pytest.importorskip("datasets")
    common = {name: tiny_tree[name] for name in ("device", "model", "logging")} | {"steps": 2}
    texts = datasets.Dataset.from_list([{"prompt": r["prompt"], "completion": r["answer"]} for r in SUMS])
    pairs = [{"prompt": r["prompt"], "chosen": r["answer"], "rejected": "x"} for r in SUMS]
    held_out = {"data.max_length": 16, "data.eval_size": 4}
    sft = rlhf_ray.sft(common, data=texts, run_dir=tmp_path / "sft", **held_out)
    assert [math.isfinite(row["loss"]) for row in sft.metrics] == [True, True]
    rm = rlhf_ray.rm(common, data=pairs, run_dir=tmp_path / "rm", **held_out)
    assert rm.samples == [] and "val/accuracy" in repr(rm)
    dpo = rlhf_ray.dpo(
        common, data=pairs, eval_data=pairs[:4], model=sft.model, run_dir=tmp_path / "dpo",
        **{"data.max_length": 16},
    )  # fmt: skip
    assert dpo.summary["after"]["val/loss"] > 0
    found = rlhf_ray.evaluate(
        models={"sft": sft.model, "dpo": str(dpo.model)}, prompts=SUMS[:3], rewards=first_digit,
        sampling={"max_new_tokens": 2}, device="cpu", run_dir=tmp_path / "eval",
    )  # fmt: skip
    assert [row["model"] for row in found.metrics] == ["sft", "dpo"]
    assert [row["prompt"] for row in found.answers("dpo")] == [row["prompt"] for row in SUMS[:3]]
    assert len(found.samples) == 3 and "sft, dpo" in repr(found)
    with pytest.raises(DataError, match="there are sft, dpo"):
        found.answers("rm")
