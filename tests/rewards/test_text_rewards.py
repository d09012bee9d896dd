"""ROUGE, and classifiers as rewards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from rlhf_ray.config.load import parse_config
from rlhf_ray.config.rewards import SafetyConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.rewards.classifier import Safety, classifier, load_classifier
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.rouge import rouge

CORPUS = ["the film was good", "the film was bad , really bad", "a very good and long story", "bad"]


def test_rouge_by_hand():
    # reference "the cat sat on the mat": longest common subsequence with "the cat the mat" is 4 words of 4 and of 6
    texts, reference = ["the cat the mat", "a dog", ""], ["the cat sat on the mat"] * 3
    assert rouge(texts, reference=reference).values == pytest.approx((2 * 1 * (4 / 6) / (1 + 4 / 6), 0, 0))
    assert rouge(texts[:1], reference=reference[:1], measure="recall").values == pytest.approx((4 / 6,))
    assert rouge(texts[:1], reference=reference[:1], kind="rouge1", measure="precision").values == (1.0,)
    # bigrams: "the cat", "cat the", "the mat"; two of three stand in the reference
    precision = rouge(texts[:1], reference=reference[:1], kind="rouge2", measure="precision")
    assert precision.values == pytest.approx((2 / 3,))


def test_rouge_takes_the_best_of_several_references_and_stems_when_asked():
    assert rouge(["b"], summary=[["a", "b", "c"]], column="summary").values == (1.0,)
    assert rouge(["cats"], reference=["cat"]).values == (0.0,)
    assert rouge(["cats"], reference=["cat"], stem=True).values == (1.0,)


def test_rouge_of_the_chinese_twin():
    # the = 这, cat = 猫, sat = 坐, on = 在, mat = 垫, a = 一, dog = 狗
    texts, reference = ["这猫这垫", "一狗", ""], ["这猫坐在这垫"] * 3
    assert rouge(texts, reference=reference).values == pytest.approx((2 * 1 * (4 / 6) / (1 + 4 / 6), 0, 0))
    assert rouge(texts[:1], reference=reference[:1], measure="recall").values == pytest.approx((4 / 6,))
    assert rouge(texts[:1], reference=reference[:1], kind="rouge1", measure="precision").values == (1.0,)
    precision = rouge(texts[:1], reference=reference[:1], kind="rouge2", measure="precision")
    assert precision.values == pytest.approx((2 / 3,))
    assert rouge(["乙"], summary=[["甲", "乙", "丙"]], column="summary").values == (1.0,)
    assert rouge(["猫们"], reference=["猫"], stem=True).values == pytest.approx((2 / 3,)), "1 of 2, 1 of 1"


def test_rouge_in_other_scripts():
    for text in ("这部电影很好。", "とても良い映画", "ภาพยนตร์ดีมาก", "فيلم جيد جدا", "Отличный фильм", "बहुत अच्छी फ़िल्म"):
        assert rouge([text, "x"], reference=[text, text]).values == (1.0, 0.0)
    # words of two and three: one in common
    assert rouge(["فيلم سيئ"], reference=["فيلم جيد جدا"], measure="recall").values == pytest.approx((1 / 3,))
    assert rouge(["ФИЛЬМ，ｇｐｔ"], reference=["фильм GPT"]).values == (1.0,), "case and width do not count"
    # 北京 / 是 / 首都 / 吗 against 北京 / 是 / 首都 / 呢: 3 of 4 words, 5 of 6 characters
    assert rouge(["北京是首都吗"], reference=["北京是首都呢"], chinese="words").values == pytest.approx((3 / 4,))
    assert rouge(["北京是首都吗"], reference=["北京是首都呢"]).values == pytest.approx((5 / 6,))


@given(st.text(alphabet="abCD.,'-_ 1\n", max_size=30), st.text(alphabet="abCD.,'-_ 1\n", max_size=30), st.booleans())
def test_english_rouge_is_that_of_rouge_score(reference, text, stem):
    from rouge_score.rouge_scorer import RougeScorer

    for kind in ("rouge1", "rougeL", "rougeLsum"):
        expected = RougeScorer([kind], use_stemmer=stem).score(reference, text)[kind].fmeasure
        assert rouge([text], reference=[reference], kind=kind, stem=stem).values == (expected,)


def test_rouge_says_what_is_wrong():
    with pytest.raises(ConfigError, match="no column 'reference', only summary"):
        rouge(["a"], summary=["a"])
    with pytest.raises(ConfigError, match="kind='rouge9'"):
        rouge(["a"], reference=["a"], kind="rouge9")
    outcome = rouge(["a", "a"], reference=[None, "a"])
    assert outcome.values == (None, 1.0) and "found no text in column 'reference'" in outcome.failures[0].what


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """make(labels, ...) -> folder of a small BERT whose labels are named."""

    def make(*labels: str, **settings) -> str:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
            **settings,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3.0)
        path = tmp_path_factory.mktemp("classifier")
        model.save_pretrained(path)
        build_tokenizer("word", CORPUS).save_pretrained(path)
        return str(path)

    return make


def logits(path: str, text: str) -> list[float]:
    model = load_classifier(path)
    return model.network(**model.tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].tolist()


def test_a_classifier_is_a_reward(folder):
    path = folder("negative", "neutral", "positive")
    reward = load_reward("classifier", args={"path": path, "label": "Neutral", "batch_size": 2})
    scores = RewardSet([reward]).score([""] * 4, CORPUS, [[1]] * 4, [{}] * 4).total
    for text, score in zip(CORPUS, scores, strict=True):
        a, b, c = map(math.exp, logits(path, text))
        assert score == pytest.approx(b / (a + b + c), abs=1e-5)
    assert classifier([""], CORPUS[:1], path=path) == pytest.approx(
        classifier([""], CORPUS[:1], path=path, label="positive")), "the last label is the good one"  # fmt: skip
    for label in ("negative", "positive"):
        ((p,), (logit,)) = (classifier([""], CORPUS[:1], path=path, label=label, output=o) for o in ("prob", "logit"))
        assert logit == pytest.approx(math.log(p / (1 - p)), abs=1e-4)
    whole = classifier(["the film was"], [" good"], path=path, whole=True)
    assert whole == pytest.approx(classifier([""], ["the film was good"], path=path), abs=1e-5)


def test_labels_that_do_not_exclude_each_other(folder):
    path = folder("toxic", "insult", problem_type="multi_label_classification")
    (score,) = classifier([""], CORPUS[:1], path=path, label="toxic")
    assert score == pytest.approx(1 / (1 + math.exp(-logits(path, CORPUS[0])[0])), abs=1e-5)
    (log,) = classifier([""], CORPUS[:1], path=path, label="toxic", output="logprob")
    assert log == pytest.approx(math.log(score), abs=1e-5)
    (logit,) = classifier([""], CORPUS[:1], path=path, label="toxic", output="logit")
    assert logit == pytest.approx(logits(path, CORPUS[0])[0], abs=1e-5)


def test_safety_by_either_label(folder):
    def scores(config: SafetyConfig) -> list[float]:
        return Safety(config).score(CORPUS).values

    path = folder("safe", "unsafe")
    safe = scores(SafetyConfig(path=path, safe_label="safe"))
    other_way = SafetyConfig(path=path, unsafe_label="unsafe", batch_size=1)
    assert scores(other_way) == pytest.approx(safe, abs=1e-5)
    assert scores(SafetyConfig(path=path)) == pytest.approx([1 - p for p in safe], abs=1e-5), "the last"
    assert max(safe) - min(safe) > 1e-3


def test_one_label_is_enough(tiny_tree):
    tree = {**tiny_tree, "safety": {"path": "x", "safe_label": "safe", "unsafe_label": "unsafe"}}
    with pytest.raises(ConfigError, match="safety.safe_label and safety.unsafe_label say the same thing twice"):
        parse_config(tree, RunConfig, source="the test")


def test_what_is_wrong_with_a_classifier(folder, tmp_path):
    with pytest.raises(ConfigError, match="has no label 'kind'; its labels are safe, unsafe"):
        classifier([""], ["x"], path=folder("safe", "unsafe"), label="kind")
    with pytest.raises(ConfigError, match="output='odds'"):
        classifier([""], ["x"], path="x", output="odds")
    reward = RewardSet([load_reward("classifier", args={"path": str(tmp_path / "none")})])
    with pytest.raises(ModelError, match="no such folder"):
        reward.score([""], ["x"], [[1]], [{}])
