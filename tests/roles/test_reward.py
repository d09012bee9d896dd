"""The judge: decoding, weights, and reward models of several shapes in any padding."""

import copy
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ByT5Tokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_ray.config.rewards import RewardModelConfig, SafetyConfig
from rlhf_ray.errors import RewardError
from rlhf_ray.models.loading import load_reward_model
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.rewards.calling import RewardFunction
from rlhf_ray.rewards.classifier import Classifier, TextScores, classifier
from rlhf_ray.rewards.compose import RewardSet
from rlhf_ray.rewards.failures import FailurePolicy
from rlhf_ray.roles.batch import build_batch
from rlhf_ray.roles.protocols import Request
from rlhf_ray.roles.reward import Reward, RewardModel

CORPUS = ["the film was good", "the film was bad , really bad", "a very good and long story", "bad"]


@pytest.fixture(scope="module")
def words():
    return build_tokenizer("word", CORPUS)


@pytest.fixture
def batch(words):
    """Two rows of the prompt "the film was": "good <eos>" and "bad , really bad"."""
    ids = lambda text: words(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    requests = [
        Request(0, i, tuple(ids("the film was")), i, {"prompt": "the film was", "label": label})
        for i, label in enumerate("xy")
    ]
    completions = [[*ids("good"), words.eos_token_id], ids("bad , really bad")]
    return build_batch(
        requests, completions, [[0.0] * len(c) for c in completions], truncated=[False, True], weight_version=0
    )


def test_functions_see_texts_ids_and_columns(words, batch):
    seen = {}

    def spy(prompts, completions, completion_ids, label, **columns):
        seen.update(locals())
        return [1.0, 2.0]

    scores = Reward(RewardSet([RewardFunction("spy", spy)]), words).score(batch)
    assert seen["prompts"] == ["the film was"] * 2 and seen["completions"] == ["good", "bad, really bad"]
    assert [len(ids) for ids in seen["completion_ids"]] == [2, 4], "EOS is among the ids, not in the text"
    assert seen["label"] == ["x", "y"]
    assert scores.score.tolist() == [1.0, 2.0] and scores.score.dtype == torch.float32
    assert scores.texts == ()


def test_weights_and_the_parts(words, batch):
    functions = RewardSet([
        RewardFunction("short", lambda completions: [float(len(c) < 8) for c in completions], weight=2.0),
        RewardFunction("len", lambda completion_ids: [len(ids) for ids in completion_ids], weight=-0.5),
    ])  # fmt: skip
    scores = Reward(functions, words).score(batch, texts=1)
    assert scores.score.tolist() == [2 * 1 - 0.5 * 2, 0 - 0.5 * 4]
    assert {name: values.tolist() for name, values in scores.by_function.items()} == {"short": [1, 0], "len": [2, 4]}
    assert scores.texts == (("the film was", "good"),)
    assert [len(ids) for ids in scores.completion_ids] == [2], "of the same rows, EOS included"


class Judge:
    """Stands in for a reward model: keeps what it is given, as texts, and gives fixed scores."""

    def __init__(self, scores, weight=1.0):
        self.config, self.scores, self.texts = RewardModelConfig(path="judge", weight=weight), scores, []

    def score(self, answers):
        self.texts += [answered.whole for answered in answers]
        return TextScores(self.scores, cut=0)


def test_the_model_adds_its_weighted_score_and_reads_whole_texts(words, batch):
    judge = Judge([0.5, -1.0], weight=4.0)
    scores = Reward(RewardSet([RewardFunction("one", lambda completions: [1.0, 1.0])]), words, model=judge).score(batch)
    assert judge.texts == ["the film was good", "the film was bad, really bad"], "with the blank between the words"
    assert scores.score.tolist() == [3.0, -3.0]
    assert scores.by_function["reward_model"].tolist() == [0.5, -1.0]


def test_safety_takes_its_share_of_the_whole_reward(words, batch):
    """(1 - w) quality + w safety, where quality is all that stands before it: 0.75 * (1 + 4 * 0.5) + 0.25 * 0.2."""
    safety = Judge([0.2, 1.0])
    safety.config = SafetyConfig(path="safety", weight=0.25)
    one = RewardSet([RewardFunction("one", lambda completions: [1.0, 1.0])])
    scores = Reward(one, words, model=Judge([0.5, -1.0], weight=4.0), safety=safety).score(batch)
    assert scores.score.tolist() == pytest.approx([2.3, -2.0])
    assert scores.by_function["safety"].tolist() == pytest.approx([0.2, 1.0])
    assert safety.texts == ["the film was good", "the film was bad, really bad"]
    safety.scores = [0.2, math.inf]
    with pytest.raises(RewardError, match="safety: row 1 scored inf; check the folder safety"):
        Reward(one, words, safety=safety).score(batch)


def test_groups_that_a_policy_drops_are_marked(words, batch):
    def picky(completions):
        return [None if text == "good" else 1.0 for text in completions]

    functions = RewardSet([RewardFunction("picky", picky, policy=FailurePolicy("drop_group"))])
    scores = Reward(functions, words).score(batch)
    assert scores.keep.tolist() == [False, False], "both rows answer the same prompt"
    assert scores.score.isnan().tolist() == [True, False] and scores.stats["fault/dropped"] == 1.0
    assert scores.events[0]["reason"].startswith("reward 'picky' gave None for row 0")
    assert Reward(RewardSet([]), words).score(batch).keep is None


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_lossless_tokenizers_need_no_blank(kind, batch):
    tokenizer = build_tokenizer(kind, [*CORPUS, "+="], vocab_size=300 if kind == "bpe" else None)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    request = Request(0, 0, tuple(ids("1+1=")), 0, {"prompt": "1+1="})
    judge, rows = Judge([0.0]), build_batch([request], [ids("od")], [[0.0] * len(ids("od"))], truncated=[False],
                                            weight_version=0)  # fmt: skip
    Reward(RewardSet([]), tokenizer, model=judge).score(rows)
    assert judge.texts == ["1+1=od"], "the prompt is kept as it was given, unknown characters too"


def test_special_tokens_of_a_prompt_stay(words):
    """A chat template's markers decode to nothing; the judge must see the prompt as the template wrote it."""
    ids = words("film was", add_special_tokens=False)["input_ids"]
    request = Request(0, 0, (words.eos_token_id, *ids), 0, {"prompt": "<|user|>film was<|assistant|>"})
    good = words("good", add_special_tokens=False)["input_ids"]
    judge, rows = Judge([0.0]), build_batch([request], [good], [[0.0]], truncated=[False], weight_version=0)
    Reward(RewardSet([]), words, model=judge).score(rows)
    assert judge.texts == ["<|user|>film was<|assistant|> good"]


def test_a_model_that_gives_no_number(words, batch):
    with pytest.raises(RewardError, match="reward_model: row 1 scored nan; check the folder judge"):
        Reward(RewardSet([]), words, model=Judge([0.5, math.nan])).score(batch)


def test_a_reward_model_judges_rows_that_no_function_does(words, batch):
    nobody = RewardSet([RewardFunction("nobody", lambda completions: [None, 2.0])])
    scores = Reward(nobody, words, model=Judge([0.5, -1.0], weight=4.0)).score(batch)
    assert scores.score.tolist() == [2.0, -2.0] and scores.keep is None and scores.events == ()
    assert scores.of_row(0) == {"nobody": None, "reward_model": 0.5}
    assert scores.of_row(1) == {"nobody": 2.0, "reward_model": -1.0}


def test_a_model_s_number_may_not_overflow_float32_with_its_weight_either(words, batch):
    with pytest.raises(RewardError, match=r"reward_model: row 1 scored 1e\+12; .*lower its weight \(1000\)"):
        Reward(RewardSet([]), words, model=Judge([0.5, 1e12], weight=1e3)).score(batch)
    assert Reward(RewardSet([]), words, model=Judge([0.5, 1e12])).score(batch).score[1] == 1e12


# ---- reward models --------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
MODELS = {
    "bert": lambda labels: BertForSequenceClassification(
        BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=32, num_labels=labels)),
    "distilbert": lambda labels: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=16, hidden_dim=16, n_layers=2, n_heads=2, max_position_embeddings=32,
                         num_labels=labels)),
    "qwen2": lambda labels: Qwen2ForSequenceClassification(
        Qwen2Config(**SIZES, num_attention_heads=2, num_key_value_heads=2, num_labels=labels)),
    "gpt2": lambda labels: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=labels)),
}  # fmt: skip


@pytest.fixture
def judge(words, tmp_path):
    """A reward model through a folder, as a run loads it; `words` pads on the left, as policies do."""

    def make(kind: str, labels: int = 1, problem_type: str | None = None, **settings) -> RewardModel:
        torch.manual_seed(0)
        model = MODELS[kind](labels)
        model.config.problem_type = problem_type
        with torch.no_grad():  # untrained heads hardly tell texts apart
            for p in model.parameters():
                p.mul_(3.0)
        model.save_pretrained(tmp_path / kind)
        words.save_pretrained(tmp_path / kind)
        network, tokenizer = load_reward_model(tmp_path / kind)
        return RewardModel(network, tokenizer, RewardModelConfig(path=str(tmp_path / kind), **settings))

    return make


def logits_alone(judge: RewardModel, text: str) -> list[float]:
    """By the plain model, one text at a time: no padding."""
    network, tokenizer = judge.classifier.network, judge.classifier.tokenizer
    return network(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_one_label_is_the_score_whatever_the_padding(judge, kind):
    model = judge(kind)
    expected = [logits_alone(model, text)[0] for text in CORPUS]
    assert model.score(CORPUS).values == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3
    in_pairs = judge(kind, batch_size=2).score(CORPUS[::-1]).values[::-1]
    assert in_pairs == pytest.approx(expected, abs=1e-5), "neither do neighbours matter"


@pytest.mark.parametrize("kind", ["bert", "qwen2", "distilbert"])
def test_two_labels(judge, kind):
    pairs = [logits_alone(judge(kind, labels=2), text) for text in CORPUS]
    odds = [good - bad for bad, good in pairs]
    assert judge(kind, labels=2).score(CORPUS).values == pytest.approx(odds, abs=1e-5)
    probability = [math.exp(good) / (math.exp(good) + math.exp(bad)) for bad, good in pairs]
    assert judge(kind, labels=2, output="prob").score(CORPUS).values == pytest.approx(probability, abs=1e-5)
    logs = [math.log(p) for p in probability]
    assert judge(kind, labels=2, output="logprob").score(CORPUS).values == pytest.approx(logs, abs=1e-5)


def test_three_labels_the_last_is_the_good_one(judge):
    a, b, c = logits_alone(judge("bert", labels=3), CORPUS[0])
    expected = math.exp(c) / (math.exp(a) + math.exp(b) + math.exp(c))
    assert judge("bert", labels=3, output="prob").score(CORPUS[:1]).values == pytest.approx([expected], abs=1e-6)


def test_one_label_as_a_probability(judge):
    logit = logits_alone(judge("bert"), CORPUS[0])[0]
    probability = judge("bert", output="prob").score(CORPUS[:1]).values
    assert probability == pytest.approx([1 / (1 + math.exp(-logit))], abs=1e-6)


def test_labels_that_do_not_exclude_each_other(judge):
    """The same folder judges alike as reward model and as reward function."""
    model = judge("bert", labels=2, problem_type="multi_label_classification")
    logit = logits_alone(model, CORPUS[0])[-1]
    assert model.score(CORPUS[:1]).values == pytest.approx([logit], abs=1e-5)
    probability = classifier([""], CORPUS[:1], path=model.config.path)
    assert probability == pytest.approx([1 / (1 + math.exp(-logit))], abs=1e-5)


def test_a_long_text_loses_its_beginning_not_its_answer_and_is_counted(judge, words, batch):
    model = judge("bert", max_length=4)
    story = "a very long story"
    texts = [f"the film was {story}", story]
    assert model.score(texts) == (pytest.approx([logits_alone(model, story)[0]] * 2, abs=1e-5), 1)
    stats = Reward(RewardSet([]), words, model=model).score(batch).stats
    assert stats["reward/reward_model_cut"] == 1, "of the film was good, and the film was bad, really bad"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("limit", [{"max_length": 512}, {}])
def test_a_text_longer_than_the_models_positions(judge, kind, limit):
    model = judge(kind, **limit)
    expected = logits_alone(model, " ".join(["good"] * 32))[0]
    assert model.score([" ".join(["good"] * 100)]) == (pytest.approx([expected], abs=1e-5), 1)


def test_one_bos_where_the_chat_template_has_written_it(judge, words):
    """As in training, where a conversation gets no special tokens but those of its template."""
    tokenizer = copy.deepcopy(words)
    tokenizer.bos_token = tokenizer.unk_token
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    plain = judge("qwen2").classifier
    model = Classifier(plain.network, tokenizer, "x")
    assert tokenizer("good")["input_ids"] == [bos_id, *words("good")["input_ids"]]
    with_bos = plain.score([f"{bos} the film was good"], 0, "logit").values
    for text in ("the film was good", f"{bos}the film was good"):
        assert model.score([text], 0, "logit").values == pytest.approx(with_bos, abs=1e-6)


def test_positions_that_are_counted_from_behind_the_paddings(words, tmp_path):
    """RoBERTa: of 34 positions a text may take 32."""
    config = RobertaConfig(**SIZES, num_attention_heads=2, max_position_embeddings=34, pad_token_id=1, num_labels=1)
    model = Classifier(RobertaForSequenceClassification(config), copy.deepcopy(words), "x")
    longest, longer = (" ".join(["good"] * n) for n in (32, 100))
    whole, cut = model.score([longest], 0, "logit"), model.score([longer], 0, "logit")
    assert (whole.cut, cut.cut) == (0, 1) and cut.values == pytest.approx(whole.values, abs=1e-5)


def test_a_slow_tokenizers_texts_are_counted_too(judge):
    model = judge("bert").classifier
    model.tokenizer = ByT5Tokenizer()
    model.network.resize_token_embeddings(len(model.tokenizer))
    assert model.score(["x" * 50, "x"], 0, "logit", max_length=16).cut == 1


def test_token_ids_are_judged_as_their_text_and_a_long_row_keeps_its_bos_and_its_end(judge, words):
    model = judge("qwen2").classifier
    ids = [tuple(words(text)["input_ids"]) for text in CORPUS]
    expected = model.score(CORPUS, 0, "logit").values
    assert model.score(ids, 0, "logit").values == pytest.approx(expected, abs=1e-6)
    assert model.score([CORPUS[0], *ids[1:]], 0, "logit").values == pytest.approx(expected, abs=1e-6)
    model.tokenizer.bos_token = "the"
    cut = model.score(ids[1:2], 0, "logit", max_length=3)
    assert cut == (pytest.approx(model.score([(ids[1][0], *ids[1][-2:])], 0, "logit").values, abs=1e-6), 1)
