"""Settings of evaluations and judges: what is refused, and how it is said."""

import pytest

from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.load import parse_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError

TREE = {"models": {"a": "x", "b": {"path": "y", "device": "cpu"}}, "data": {"path": "p.jsonl"}}


def parse(**changes):
    return parse_config({**TREE, **changes}, EvalRunConfig, source="eval.yaml")


def problems(**changes):
    with pytest.raises(ConfigError) as error:
        parse(**changes)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def test_a_model_may_be_given_by_its_path_alone():
    config = parse()
    assert config.models["a"].path == "x" and config.models["b"].device == "cpu"
    assert config.baseline_name == "a" and parse(baseline="b").baseline_name == "b"


def test_several_sources_are_refused_not_read_in_part():
    data = {"sources": ["p.jsonl", "q.jsonl"]}
    assert "data.sources: the rows are of one source here; set data.path, once for each" in problems(data=data)
    with pytest.raises(ConfigError, match=r"data\.sources: the rows are of one source here"):
        pairs = {"model": "m", "rewards": [{"function": "length"}], "data": data}
        parse_config(pairs, PairsConfig, source="pairs.yaml")


def test_contradictions_come_all_at_once():
    found = problems(
        baseline="c",
        sampling={"temperature": 0.0, "samples_per_prompt": 4},
        pass_at={"k": [1, 8]},
        win_rate={"by": "judge"},
        generator={"count": 2, "tensor_parallel": 2},
    )
    assert found == [
        "sampling.temperature=0 gives the same answer 4 times; set a temperature above 0, or "
        "sampling.samples_per_prompt=1",
        "generator.count=2: here one model answers at a time; set generator.count=1",
        "generator.tensor_parallel is vLLM's; set generator.engine=vllm or generator.tensor_parallel=1",
        "baseline=c is none of the models; choose one of a, b",
        "pass_at.k=8 needs as many answers a prompt, and sampling.samples_per_prompt=4; raise it, or lower k",
        "win_rate.by=judge and there is none; set judge.model",
    ]
    assert problems(win_rate={"by": "reward"}) == [
        "win_rate.by=reward and there is none; set rewards or reward_model.path"]  # fmt: skip


def test_unknown_keys_of_a_judge_reward_die_like_all_others():
    args = {"model": "m", "endpont": "http://x", "scale": [5, 1]}
    assert problems(rewards=[{"function": "sentiment"}, {"function": "judge", "args": args}]) == [
        "rewards.1.args.endpont: unknown key of a judge; did you mean endpoint?"]  # fmt: skip
    del args["endpont"]
    (found,) = problems(rewards=[{"function": "judge", "args": args}])
    assert found.startswith("rewards.0.args: value error, scale=[5, 1] does not rise")
    safety = {"function": "judge", "args": {}}
    assert problems(red_team={"path": "r.jsonl", "safety": safety}) == ["red_team.safety.args.model: field required"]


def test_a_judge_that_rewards_a_training_run_is_as_strict():
    tree = {"model": {"path": "x"}, "data": {"path": "p.jsonl"}}
    reward = {"function": "judge", "args": {"model": "m", "rubrik": "honest"}}
    with pytest.raises(ConfigError, match=r"rewards\.0\.args\.rubrik: unknown key of a judge; did you mean rubric\?"):
        parse_config({**tree, "rewards": [reward]}, RunConfig, source="rl.yaml")


def test_names_that_cannot_be_files():
    (found,) = problems(models={"a/b": "x"})
    assert "a/b" in found and "pattern" in found


def test_the_longest_prompt_of_both_lists():
    red = {"path": "r", "safety": {"function": "sentiment"}, "max_prompt_tokens": 2000}
    assert parse(red_team=red).longest_prompt == 2000 and parse().longest_prompt == 1024
