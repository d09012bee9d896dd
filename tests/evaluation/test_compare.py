"""The whole comparison with hand-worked answers, and once with two real models."""

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.errors import ConfigError, DataError, ModelError
from rlhf_ray.evaluation.compare import compare
from rlhf_ray.rewards.failures import Failure
from rlhf_ray.rewards.judge_questions import Opinion


@pytest.fixture
def config(folders):
    """Four held-out sums, two answers each."""

    def make(**changes):
        tree = {
            "device": "cpu",
            "models": {"base": str(folders / "base"), "tuned": str(folders / "tuned")},
            "data": {"path": "task:arithmetic", "limit": 4, "max_prompt_tokens": 8},
            "sampling": {"samples_per_prompt": 2, "max_new_tokens": 6},
            "rewards": [{"function": "exact_answer"}],
            "pass_at": {"k": [1, 2]},
        }
        return EvalRunConfig(**{**tree, **changes})

    return make


def wrong(request, member):
    return "0"


def first_right(request, member):
    return request.columns["answer"] if member == 0 else "0"


def test_rewards_pass_at_k_and_win_rate_by_hand(config, table):
    made = table(base=(wrong, 0.5), tuned=(first_right, 0.5))
    result = compare(config()).result
    base, tuned = (result["models"][name]["metrics"] for name in ("base", "tuned"))
    assert (tuned["reward"], tuned["reward_std"], tuned["accuracy"]) == (0.5, 0.5, 0.5)
    assert (tuned["pass@1"], tuned["pass@2"]) == (0.5, 1.0) and base["pass@2"] == 0.0
    assert base["response_len"] == 2.0 and base["truncated_frac"] == 0.0 and base["response_len_max"] == 2.0
    assert base["distinct_1"] == 1 / 8 and base["self_bleu"] == 1.0
    assert base["distinct_1_tokens"] == 2 / 16, "8 times the answer and EOS"
    rate = result["win_rate"]["tuned"]
    assert (rate["by"], rate["wins"], rate["losses"], rate["ties"], rate["rate"]) == ("reward", 4, 0, 4, 1.0)
    assert rate["interval"] == "wilson" and 0.5 < rate["low"] < 0.6 and rate["high"] == 1.0
    assert result["baseline"] == "base" and "base" not in result["win_rate"]
    assert made["base"].closed and made["tuned"].closed
    sample = result["samples"][0]
    answer = made["tuned"].asked[0][0].columns["answer"]
    assert sample["prompt"].endswith("=") and sample["answers"] == {
        "base": {"completion": "0", "reward": 0.0}, "tuned": {"completion": answer, "reward": 1.0}}  # fmt: skip


def test_what_counts_as_right_is_named(config, table, tmp_path):
    """By length: 3 letters score 0.75, 1 letter 0.25. The verifiable reward beside it does not decide then."""
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completions, **_): return [len(c) / 4 for c in completions]")
    rewards = [{"function": "exact_answer"}, {"function": f"{reward}:length", "isolated": False}]
    table(base=(lambda r, m: "aaa" if m == 0 else "a", 0.5), tuned=(lambda r, m: "aaa", 0.5))
    for right_at, base, tuned in ((0.75, 0.5, 1.0), (0.76, 0.0, 0.0), (0.25, 1.0, 1.0)):
        right = {"k": [1], "reward": "length", "right_at": right_at}
        models = compare(config(rewards=rewards, pass_at=right)).result["models"]
        for name, share in (("base", base), ("tuned", tuned)):
            metrics = models[name]["metrics"]
            assert (metrics["accuracy"], metrics["pass@1"]) == (share, share), (right_at, name)
            assert metrics["reward/exact_answer"] == 0.0


def test_both_models_get_the_same_prompts_and_seeds_as_every_evaluation(config, table):
    from rlhf_ray.sample import sample_seed

    made = table(base=(wrong, 0.5), tuned=(wrong, 0.5))
    compare(config(seed=7))
    assert made["base"].asked == made["tuned"].asked
    requests = made["base"].asked[0]
    assert [r.prompt_id for r in requests] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [r.seed for r in requests[:3]] == [sample_seed(7, -1, 0), sample_seed(7, -1, 1), sample_seed(7, -2, 0)]
    sampling = made["base"].sampling[0]
    assert sampling.max_new_tokens == 6 and sampling.stop_token_ids == (1,)


def test_a_model_is_gone_before_its_rewards_or_the_next_model_are_loaded(config, table, monkeypatch):
    from rlhf_ray.evaluation import answers

    made, order = table(base=(wrong, 0.5), tuned=(wrong, 0.5)), []

    def make_reward(judging, assets, make=answers.make_reward):
        order.append((Path(assets.policy).name, made["base"].closed, made["tuned"].closed))
        return make(judging, assets)

    monkeypatch.setattr(answers, "make_reward", make_reward)
    compare(config())
    assert order == [("base", True, False), ("tuned", True, True)]


def test_perplexity_and_its_alarm(config, table, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "some words"}\n{"text": "a rather longer text, in windows"}\n')
    perplexity = {"path": str(texts), "window": 512}
    table(base=(wrong, 1 / 4), tuned=(wrong, 1 / 5))
    result = compare(config(perplexity=perplexity)).result
    base, tuned = (result["models"][name]["metrics"] for name in ("base", "tuned"))
    assert base["perplexity"] == pytest.approx(4) and tuned["perplexity"] == pytest.approx(5)
    assert "perplexity_rise" not in base and tuned["perplexity_rise"] == pytest.approx(0.25)
    assert base["bits_per_byte"] == pytest.approx(2 * (9 + 31) / (10 + 32)), "2 bits for all but the first characters"
    (alarm,) = result["alarms"]
    assert "tuned: perplexity" in alarm and "25% above that of base (limit 15%)" in alarm
    assert compare(config(perplexity={**perplexity, "alarm_rise": 0.3})).result["alarms"] == []


def test_harmful_answers_by_hand(config, table, tmp_path):
    red_team = tmp_path / "red.jsonl"
    red_team.write_text("".join(json.dumps({"prompt": f"r{i}"}) + "\n" for i in range(4)))
    safe = {"function": "regex", "args": {"pattern": "no"}}
    settings = {"path": str(red_team), "safety": safe, "max_prompt_tokens": 10}
    made = table(
        base=(lambda r, m: "no", 0.5), tuned=(lambda r, m: "yes" if r.columns["prompt"] == "r2" else "no", 0.5)
    )
    result = compare(config(red_team=settings)).result
    assert result["models"]["base"]["metrics"]["harmful_rate"] == 0.0
    assert result["models"]["tuned"]["metrics"]["harmful_rate"] == 0.25
    assert len(made["base"].asked[1]) == 4, "one answer a red-team prompt"
    reversed_sign = {**settings, "safety": {**safe, "weight": -1.0}, "harmful_below": -0.5}
    rates = compare(config(red_team=reversed_sign)).result["models"]
    assert rates["tuned"]["metrics"]["harmful_rate"] == 0.75, "the weight counts"


class LongerIsBetter:
    """But it likes A where both are equally long, and cannot read the prompt with a 9 at its beginning."""

    async def compare(self, prompts, a, b):
        return [
            Failure("got no readable reply", "?") if p.startswith("9") else Opinion("B" if len(y) > len(x) else "A")
            for p, x, y in zip(prompts, a, b, strict=True)
        ]


def test_win_rate_by_a_judge(config, table, monkeypatch):
    for place in ("compare", "answers"):
        monkeypatch.setattr(f"rlhf_ray.evaluation.{place}.open_judge", lambda settings: LongerIsBetter())
    table(base=(wrong, 0.5), tuned=(first_right, 0.5))
    comparison = compare(config(judge={"model": "m"}, data={"path": "task:arithmetic", "limit": 30}))
    rate = comparison.result["win_rate"]["tuned"]
    nines = 2 * sum(prompt.startswith("9") for prompt in comparison.prompts)
    assert nines > 0 and rate["unjudged"] == nines and rate["by"] == "judge"
    # The first answers are longer than "0"; the second ones are "0" too, where the judge contradicts itself
    decided = 30 - nines // 2
    assert (rate["wins"], rate["losses"], rate["ties"]) == (decided, 0, decided)
    assert rate["order_bias_rate"] == 0.5


def test_a_reward_that_fails_for_a_row_is_no_number(config, table, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def f(completions, **_): return [None if c == '0' else 1.0 for c in completions]")
    rewards = [{"function": f"{reward}:f", "on_failure": "drop_group", "isolated": False, "binary": True}]
    table(base=(lambda r, m: "7", 0.5), tuned=(lambda r, m: "0" if r.sample_id == 1 else "7", 0.5))
    result = compare(config(rewards=rewards)).result
    tuned = result["models"]["tuned"]["metrics"]
    assert tuned["reward"] == 1.0 and not math.isnan(tuned["reward_std"])
    assert tuned["pass@1"] == 7 / 8, "an answer that nobody could judge is not right"
    assert result["win_rate"]["tuned"]["ties"] == 7, "only the pairs that both have a score"


def test_a_reward_model_and_a_safety_classifier(config, table, folders, tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 16, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(Qwen2Config(**shape, num_labels=2)).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    path = str(tmp_path / "judge")
    table(base=(wrong, 0.5), tuned=(first_right, 0.5))
    changes = {"rewards": [], "reward_model": {"path": path, "weight": 2.0}, "safety": {"path": path, "weight": 0.25}}
    comparison = compare(config(**changes, win_rate={"by": "reward_model"}))
    scores = comparison.answers["tuned"].scores
    model, safety = scores.by_function["reward_model"], scores.by_function["safety"]
    assert scores.score.tolist() == pytest.approx((0.75 * 2.0 * model + 0.25 * safety).tolist())
    metrics = comparison.result["models"]["tuned"]["metrics"]
    assert metrics["reward/reward_model"] == pytest.approx(float(model.mean()))
    assert metrics["reward_std/reward_model"] == pytest.approx(float(model.std(correction=0)))
    assert "pass@1" not in metrics, "no reward here says what is right"
    rate = comparison.result["win_rate"]["tuned"]
    assert rate["by"] == "reward_model" and rate["ties"] == 4, "the second answers are the same"


def test_no_reward_at_all(config, table):
    table(base=(wrong, 0.5), tuned=(wrong, 0.5))
    result = compare(config(rewards=[])).result
    assert result["win_rate"] == {} and "reward" not in result["models"]["base"]["metrics"]
    assert result["samples"][0]["answers"]["base"] == {"completion": "0", "reward": None}


def test_rows_that_one_model_cannot_read_are_left_out_for_all(config, table, tmp_path, folders):
    from rlhf_ray.models.scratch import build_scratch
    from rlhf_ray.models.tokenizers import build_tokenizer

    words = tmp_path / "words"
    tokenizer = build_tokenizer("word", ["one two three four five six"])
    build_scratch("qwen2", vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2).save_pretrained(words)
    tokenizer.save_pretrained(words)
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "one two"}\n{"prompt": "one two three"}\n{"prompt": "six"}\n')
    models = {"words": str(words), "base": str(folders / "base")}
    table(words=(wrong, 0.5), base=(wrong, 0.5))
    limits = {"path": str(data), "max_prompt_tokens": 7, "overlong_prompts": "drop"}
    comparison = compare(config(models=models, data=limits, rewards=[{"function": "sentiment"}]))
    assert comparison.prompts == ("one two", "six")
    assert comparison.result["dropped"] == {"words": {}, "base": {"long": 1}}
    data.write_text('{"prompt": "one two three"}\n{"prompt": "one two"}\n')
    with pytest.raises(DataError, match="no usable prompt"):
        compare(config(models=models, data={**limits, "max_prompt_tokens": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"win_rate": {"by": "sentimant"}}, "win_rate.by=sentimant is none of judge, reward, exact_answer"),
     ({"pass_at": {"reward": "exact"}}, "pass_at.reward=exact is none of the rewards; choose one of exact_answer"),
     ({"rewards": [{"function": "exakt_answer"}]}, "did you mean 'exact_answer'"),
     ({"sampling": {"max_new_tokens": 20, "samples_per_prompt": 2}}, "has 6 tokens, and with sampling.*=20 .* 16 pos")],
)  # fmt: skip
def test_what_people_get_wrong_is_refused_before_anything_is_sampled(config, table, changes, message):
    made = table(base=(wrong, 0.5), tuned=(wrong, 0.5))
    with pytest.raises(ConfigError, match=message):
        compare(config(**changes))
    assert made["base"].asked == []


def test_a_tokenizer_of_another_model_is_refused(config, folders, tmp_path, monkeypatch):
    """Its tokens have no embedding: an index error in the generator."""
    from rlhf_ray.models.scratch import build_scratch

    monkeypatch.setattr("rlhf_ray.evaluation.compare.open_model", lambda *_: pytest.fail("a model was loaded"))
    build_scratch("gpt2", vocab_size=5, hidden_size=8, layers=1, heads=1).save_pretrained(tmp_path / "base")
    models = {"base": {"path": str(tmp_path / "base"), "tokenizer": str(folders / "tuned")}}
    with pytest.raises(ModelError, match="is beyond the 5 embeddings of .*base.* set the model's tokenizer to the"):
        compare(config(models=models))


def test_a_missing_package_is_no_surprise_after_sampling(config, table, monkeypatch):
    monkeypatch.setattr("rlhf_ray.config.extras.find_spec", lambda module: None)
    monkeypatch.setattr("rlhf_ray.evaluation.compare.open_model", lambda *_: pytest.fail("a model was loaded"))
    table(base=(wrong, 0.5), tuned=(wrong, 0.5))
    with pytest.raises(ConfigError, match=r"sacrebleu .*scipy .*pip install 'rlhf-ray\[eval\]'"):
        compare(config())


@pytest.mark.slow
def test_real_models_give_the_same_numbers_twice_and_at_temperature_0_one_answer(config, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a text that is longer than the sixteen positions of the model"}\n')
    settings = config(perplexity={"path": str(texts)}, rewards=[{"function": "repetition_penalty"}])
    one, again = compare(settings).result, compare(settings).result
    assert one == again
    tuned = one["models"]["tuned"]["metrics"]
    assert tuned["perplexity"] == pytest.approx(98, rel=0.5), "untrained: about as many choices as tokens"
    assert one["models"]["base"]["metrics"]["perplexity"] != tuned["perplexity"]
    greedy = config(sampling={"temperature": 0.0, "max_new_tokens": 6}, pass_at={"k": [1]})
    changed = greedy.model_copy(update={"seed": 5})
    assert compare(greedy).answers["base"].completions == compare(changed).answers["base"].completions
