"""Preference pairs from a model's own answers, with hand-worked answers and judges."""

import json
from collections import Counter

import pytest
import yaml

from rlhf_ray import cli
from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.load import load_config, parse_config
from rlhf_ray.data.prompts import prompt_encoder
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.types import PreferenceRow, detect, parse
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.evaluation.answers import tokenizer_of
from rlhf_ray.feedback.pairs import describe, human_pairs, make_pairs, run_pairs
from rlhf_ray.rewards.failures import Failure
from rlhf_ray.rewards.judge_questions import Opinion


@pytest.fixture
def tree(folders, tmp_path):
    """Three prompts, three answers each, labelled by how many of the letters x and y they hold."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(3)))
    rewards = [{"function": "keyword", "args": {"keywords": ["x", "y"]}, "name": "letters"}]
    return {
        "name": "tiny",
        "seed": 3,
        "device": "cpu",
        "model": str(folders / "base"),
        "data": {"path": str(data), "max_prompt_tokens": 8},
        "sampling": {"samples_per_prompt": 3, "max_new_tokens": 6},
        "rewards": rewards,
    }


@pytest.fixture
def config(tree):
    return lambda **changes: parse_config({**tree, **changes}, PairsConfig, source="pairs.yaml")


ANSWERS = {"p0": ["x y", "x", "z"], "p1": ["x", "x", "y"], "p2": ["z", "z", "z"]}


def answer(request, member):
    return ANSWERS[request.columns["prompt"]][member]


def test_pairs_labelled_by_a_reward(config, table):
    made = table(base=(answer, 0.5))
    rows, result = make_pairs(config())
    # p0: x y (1) > x (1/2) > z (0). p1: x twice is one text, and x and y score the same. p2: one text only.
    assert [(r["prompt"], r["chosen"], r["rejected"], r["margin"]) for r in rows] == [
        ("p0", "x y", "x", 0.5), ("p0", "x y", "z", 1.0), ("p0", "x", "z", 0.5)]  # fmt: skip
    assert result["compared"] == 9 and result["dropped"] == {"same_text": 4, "tie": 2, "unjudged": 0}
    assert (result["prompts"], result["answers"], result["pairs"]) == (3, 9, 3)
    assert rows[0]["source"].endswith("prompts.jsonl:1") and made["base"].closed
    lineage = {"labeller": "reward:letters", "seed": 3, "model": config().model.path, "data": config().data.path}
    assert lineage.items() <= rows[0].items() and lineage.items() <= result.items()
    assert "order_bias_rate" not in result and "human" not in result


def test_best_and_worst_with_a_margin(config, table):
    table(base=(answer, 0.5))
    rows, result = make_pairs(config(pairing="best_worst", min_margin=0.75))
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("x y", "z")]
    assert result["compared"] == 3 and result["dropped"] == {"same_text": 1, "tie": 1, "unjudged": 0}


class Judge:
    """Prefers what holds an x; names A where both or neither do; cannot read a z that stands first."""

    def __init__(self, gap=None):
        self.asked = Counter()
        self.gap = gap

    async def compare(self, prompts, a, b):
        self.asked.update(zip(prompts, a, b, strict=True))
        return [self.one(*pair) for pair in zip(a, b, strict=True)]

    def one(self, a, b):
        if a == "z" and self.gap is None:
            return Failure("got no readable reply", "?")
        better_b = "x" in b and "x" not in a
        return Opinion("B" if better_b else "A", self.gap and self.gap * (-1 if better_b else 1))


@pytest.fixture
def judge(monkeypatch):
    def install(judge):
        for module in ("rlhf_ray.feedback.pairs", "rlhf_ray.evaluation.answers"):
            monkeypatch.setattr(f"{module}.open_judge", lambda settings: judge)
        return judge

    return install


def test_pairs_labelled_by_a_judge_in_both_orders(config, table, judge):
    table(base=(answer, 0.5))
    asked = judge(Judge()).asked
    rows, result = make_pairs(config(judge={"model": "j"}))
    # p0: "x y" or x against z cannot be judged, and "x y" against x names A twice; p1: x beats y, twice
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in rows] == [("p1", "x", "y")] * 2
    assert result["dropped"] == {"same_text": 4, "tie": 1, "unjudged": 2} and "margin" not in rows[0]
    assert asked[("p1", "x", "y")] == asked[("p1", "y", "x")] == 2
    assert result["order_bias_rate"] == pytest.approx(1 / 3) and result["named_first_rate"] == pytest.approx(4 / 6)
    assert rows[0]["labeller"] == "judge:j"
    assert "contradicts itself in 33.3% of the pairs; it names what stands first in 66.7%" in describe(result)


def test_a_local_judges_margin_is_no_margin_of_a_reward(config, table, judge):
    table(base=(answer, 0.5))
    judge(Judge(gap=2.0))
    rows, _ = make_pairs(config(judge={"model": "j"}))
    assert rows[0]["judge_margin"] == 2.0 and "margin" not in rows[0]


@pytest.fixture
def dialogues(tmp_path):
    """Anthropic HH's format: three pairs of people, and one with an empty answer."""
    path = tmp_path / "hh.jsonl"
    pairs = [(" x", " y"), ("", " x"), (" y", " x"), (" x x", " z")]
    start = "\n\nHuman: Q\n\nAssistant:"
    path.write_text("".join(json.dumps({"chosen": start + c, "rejected": start + r}) + "\n" for c, r in pairs))
    return {"path": str(path), "max_prompt_tokens": 64}


def test_agreement_with_people(config, table, judge, dialogues, folders):
    table(base=(lambda r, m: "abc"[m], 0.5))
    judge(Judge(gap=2.0))
    wide = {"samples_per_prompt": 3, "max_new_tokens": 1}
    with pytest.raises(ConfigError, match="more than the 16 positions"):
        make_pairs(config(judge={"model": "j"}, data=dialogues))
    from rlhf_ray.models.loading import load_policy
    from rlhf_ray.models.scratch import build_scratch

    size = load_policy(folders / "base").config.vocab_size
    build_scratch("lstm", vocab_size=size, hidden_size=8, layers=1, max_length=64).save_pretrained(folders / "wide")
    table(wide=(lambda r, m: "xyz"[m], 0.5))
    model = {"path": str(folders / "wide"), "tokenizer": str(folders / "base")}
    _, result = make_pairs(config(judge={"model": "j"}, data=dialogues, model=model, sampling=wide))
    human = result["human"]
    assert (human["agreed"], human["disagreed"], human["ties"], human["agreement"]) == (2, 1, 0, pytest.approx(2 / 3))
    assert "agreement with people: 66.7% [" in describe(result)
    # by a reward: " x" holds one of the two letters, as " y" does; " x x" one, " z" none
    _, result = make_pairs(config(data=dialogues, model=model, sampling=wide))
    human = result["human"]
    assert (human["agreed"], human["disagreed"], human["ties"]) == (1, 0, 2)
    _, result = make_pairs(config(data=dialogues, model=model, sampling=wide, human_pairs=0))
    assert "human" not in result


def test_pairs_of_people_are_read_with_what_the_settings_give_a_prompt(config, tmp_path, folders):
    ask, yes, no = ({"role": role, "content": said} for role, said in (("user", "Q"), ("assistant", "x"),
                                                                      ("assistant", "y")))  # fmt: skip
    path, rule = tmp_path / "people.jsonl", {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [ask], "chosen": [yes], "rejected": [no]},
            {"prompt": [{**rule, "content": "Rhyme."}, ask], "chosen": [yes], "rejected": [no]},
            {"prompt": [ask], "chosen": [yes, ask, yes], "rejected": [no]}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "chat_template": "zephyr", "system_prompt": "Be brief.",
            "chat_template_args": {"mood": "calm"}}  # fmt: skip
    settings = config(data=data)
    pairs = human_pairs(settings, prompt_encoder(settings.data, tokenizer_of(settings.model), settings.clock))
    asked = [pair.chat and pair.chat.messages for pair in pairs]
    assert asked == [(rule, ask), ({**rule, "content": "Rhyme."}, ask), None]
    assert pairs[0].chat.template_args["mood"] == "calm"


def test_a_missing_package_is_no_surprise_after_sampling(config, table, dialogues, monkeypatch):
    """scipy is for the agreement with people alone, which only the data can ask for."""
    monkeypatch.setattr("rlhf_ray.config.extras.find_spec", lambda module: None)
    table(base=(answer, 0.5))
    assert make_pairs(config())[1]["pairs"] == 3
    monkeypatch.setattr("rlhf_ray.feedback.pairs.open_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"scipy \(for human_pairs\); .*pip install 'rlhf-ray\[eval\]'"):
        make_pairs(config(data=dialogues))
    with pytest.raises(ConfigError, match=r"openai .*rlhf-ray\[judge\]"):
        make_pairs(config(judge={"model": "j", "endpoint": "http://127.0.0.1:1"}))


def test_what_is_written_is_what_rm_and_dpo_read(config, table, tmp_path):
    table(base=(answer, 0.5))
    result = run_pairs(config(), tmp_path / "run")
    rows = list(read_rows(f"{result['run_dir']}/pairs.jsonl"))
    assert {detect(row) for row in rows} == {"preference"}
    assert parse(rows[0], "preference") == (PreferenceRow("p0", "x y", "x", 0.5),)
    assert DatasetConfig(path=f"{result['run_dir']}/pairs.jsonl").type == "auto"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["pairs"] == 3
    assert json.loads((tmp_path / "run" / "pairs.json").read_text())["labeller"] == "reward:letters"
    kept = load_config(tmp_path / "run" / "config.yaml", [], PairsConfig)
    assert kept == config().model_copy(update={"clock": kept.clock}) and kept.clock is not None


def test_chat_prompts_stay_messages(config, table, tmp_path, folders, monkeypatch):
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "Q"}]}) + "\n")
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}")
    table(base=(lambda r, m: ["x y", "x", "z"][m], 0.5))
    chat = {"path": str(data), "max_prompt_tokens": 8, "chat_template": str(template)}
    rows, _ = make_pairs(config(data=chat))
    assert rows[0]["prompt"] == [{"role": "user", "content": "Q"}] and rows[0]["chosen"] == "x y"
    written = tmp_path / "pairs.jsonl"
    written.write_text(json.dumps(rows[0]) + "\n")
    (row,) = read_rows(str(written))
    (pair,) = parse(row, detect(row))
    assert pair.chosen == ({"role": "assistant", "content": "x y"},)


def test_no_pair_is_left(config, table, tmp_path):
    table(base=(lambda r, m: "z", 0.5))
    with pytest.raises(DataError, match="no pair is left: {'same_text': 9"):
        run_pairs(config(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "pairs.json").read_text())["dropped"]["same_text"] == 9
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rewards": []}, "nobody labels the pairs"), ({"label_by": "judge"}, "label_by=judge and there is none"),
     ({"judge": {"model": "j"}, "pairing": "best_worst"}, "pairing=best_worst needs a score"),
     ({"judge": {"model": "j"}, "label_by": "reward"}, "judge.model=j would never be asked; set label_by=judge, or re"),
     ({"sampling": {"samples_per_prompt": 1}}, "greater than 1"),
     ({"sampling": {"temperature": 0.0, "samples_per_prompt": 2}}, "gives the same answer 2 times")],
)  # fmt: skip
def test_what_is_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_the_command(tree, table, tmp_path, capsys):
    table(base=(answer, 0.5))
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(tree))
    cli.app(["pairs", str(path), "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    output = capsys.readouterr().out
    assert "3 pairs of 9 answers to 3 prompts, labelled by reward:letters" in output and "4 same_text, 2 tie" in output
    assert f"The pairs are in {tmp_path / 'run'}/pairs.jsonl" in output
