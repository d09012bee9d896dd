"""The local judge: verdicts from probabilities, against a model whose probabilities are known."""

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.errors import RewardError
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.rewards.failures import Failure
from rlhf_ray.rewards.judge import compare_both_orders, open_judge
from rlhf_ray.rewards.judge_local import LocalJudge
from rlhf_ray.rewards.judge_questions import pair_messages, score_messages

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[judge]"


class Table(torch.nn.Module):
    """Gives the next token's probabilities by the last token: a row of `table`, over the tokenizer's ids."""

    def __init__(self, table, vocab, positions=None):
        super().__init__()
        self.table, self.vocab, self.device = table, vocab, torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=positions))
        self.seen = []

    def forward(self, input_ids, attention_mask):
        self.seen.append((input_ids, attention_mask))
        logits = torch.full((*input_ids.shape, self.vocab), -30.0)
        for row, column in [(r, c) for r in range(input_ids.shape[0]) for c in range(input_ids.shape[1])]:
            for token, probability in self.table.get(int(input_ids[row, column]), {}).items():
                logits[row, column, token] = math.log(probability)
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer():
    """A character tokenizer: " 10" is the tokens blank, 1, 0."""
    return build_tokenizer("char", [*map(chr, range(32, 127)), "\n"])


def judge_with(tokenizer, table, positions=None, **settings):
    ids = {c: tokenizer(c)["input_ids"][0] for c in ' :AB0123456789'}
    numbered = {ids[c]: {ids[t]: p for t, p in row.items()} for c, row in table.items()}
    model = Table(numbered, len(tokenizer), positions)
    return LocalJudge(JudgeConfig(model="m", **settings), model, tokenizer), model


def run(coroutine):
    return asyncio.run(coroutine)


def test_the_expected_score_by_hand(tokenizer):
    # After "Score:" a blank; then 1 (0.6), 2 (0.3) or 3 (0.1)
    judge, _ = judge_with(tokenizer, {":": {" ": 1.0}, " ": {"1": 0.6, "2": 0.3, "3": 0.1}}, scale=(1, 3))
    assert run(judge.score(["p"], ["c"])) == pytest.approx([0.6 * 1 + 0.3 * 2 + 0.1 * 3])


def test_one_is_not_the_beginning_of_ten(tokenizer):
    # 1 has 0.5, of which 0.8 go on to 10: 1 alone has 0.1. 2 has 0.2, what else there is does not count.
    table = {":": {" ": 1.0}, " ": {"1": 0.5, "2": 0.2, "A": 0.3}, "1": {"0": 0.8, "A": 0.2}}
    judge, _ = judge_with(tokenizer, table, scale=(1, 10))
    expected = (0.1 * 1 + 0.2 * 2 + 0.4 * 10) / (0.1 + 0.2 + 0.4)
    assert run(judge.score(["p"], ["c"])) == pytest.approx([expected], rel=1e-6)


def test_a_pair_by_hand(tokenizer):
    judge, _ = judge_with(tokenizer, {":": {" ": 1.0}, " ": {"A": 0.6, "B": 0.2, "1": 0.2}})
    (opinion,) = run(judge.compare(["p"], ["x"], ["y"]))
    assert opinion.choice == "A" and opinion.gap == pytest.approx(math.log(3))
    (verdict,) = compare_both_orders(judge, ["p"], ["x"], ["y"])
    assert verdict.winner == "tie" and verdict.position_bias, "it looks at nothing, so it only likes A"
    assert verdict.margin == pytest.approx(0)


def test_it_reads_the_question_up_to_where_the_verdict_stands(tokenizer):
    judge, model = judge_with(tokenizer, {":": {" ": 1.0}, " ": {"A": 0.5, "B": 0.5}})
    (opinion,) = run(judge.compare(["p"], ["x"], ["y"]))
    assert opinion.choice == "tie"
    tokens, mask = model.seen[0]
    system, user = pair_messages(judge.config, "p", "x", "y")
    texts = [tokenizer.decode(row[keep.bool()]) for row, keep in zip(tokens, mask, strict=True)]
    assert texts == [f"{system['content']}\n\n{user['content']}\n\nVerdict:", texts[0] + " "]


def test_a_chat_template_is_used_where_there_is_one(tokenizer):
    judge, model = judge_with(tokenizer, {":": {" ": 1.0}, " ": {"1": 0.5, "2": 0.5}}, scale=(1, 2))
    tokenizer.chat_template = CHAT
    try:
        run(judge.score(["p"], ["c"]))
    finally:
        tokenizer.chat_template = None
    system, user = score_messages(judge.config, "p", "c")
    assert tokenizer.decode(model.seen[0][0][0], skip_special_tokens=True) == (
        f"[system]{system['content']}[user]{user['content']}[judge]Score:"
    )


def test_what_is_too_long_fails_alone(tokenizer):
    asked = "\n\n".join(message["content"] for message in score_messages(JudgeConfig(model="m"), "p", "c"))
    length = len(f"{asked}\n\nScore: 1")
    judge, _ = judge_with(tokenizer, {":": {" ": 1.0}, " ": {"1": 1.0}, "1": {"A": 1.0}}, positions=length)
    good, bad = run(judge.score(["p", "p"], ["c", "cc"]))
    assert good == pytest.approx(1.0)
    assert isinstance(bad, Failure) and f"{length + 1} tokens, it reads {length}" in bad.what


def test_a_tokenizer_that_cannot_write_the_verdict(tokenizer):
    words = build_tokenizer("word", ["no such letters here"])
    judge = LocalJudge(JudgeConfig(model="m"), Table({}, 9), words)
    with pytest.raises(RewardError, match="cannot tell ' A', ' B' apart"):
        run(judge.compare(["p"], ["x"], ["y"]))


@pytest.mark.parametrize("kind", ["qwen2", "lstm"])
def test_a_real_folder_with_and_without_kept_logits(kind, tokenizer, tmp_path):
    """The probabilities of a plain forward pass over prompt and candidate, one row at a time."""
    model = build_scratch(kind, vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2, max_length=2000)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = open_judge(JudgeConfig(model=str(tmp_path), device="cpu", scale=(8, 11)))
    assert judge is open_judge(JudgeConfig(model=str(tmp_path), device="cpu", scale=(8, 11))), "loaded once"
    (score,) = run(judge.score(["p"], ["c"]))
    text = "\n\n".join(m["content"] for m in score_messages(judge.config, "p", "c")) + "\n\nScore:"

    def likelihood(candidate):
        ids = tokenizer(text + candidate, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = ids.shape[1] - len(candidate)
        return math.exp(sum(float(logp[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])))

    weights = {n: likelihood(f" {n}") for n in (8, 9, 10, 11)}
    assert score == pytest.approx(sum(n * w for n, w in weights.items()) / sum(weights.values()), rel=1e-5)


def test_no_such_model(tmp_path):
    with pytest.raises(RewardError, match=r"no such folder.*set judge\.endpoint"):
        open_judge(JudgeConfig(model=str(tmp_path / "nowhere")))


def test_a_template_that_prints_the_date_prints_that_of_the_clock(tokenizer):
    judge, model = judge_with(tokenizer, {":": {" ": 1.0}, " ": {"1": 1.0}}, scale=(1, 3), clock="2031-05-06T00:00:00")
    tokenizer.chat_template = "[{{ strftime_now('%d %m %Y') }}]" + CHAT
    try:
        run(judge.score(["p"], ["c"]))
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(model.seen[0][0][0]).startswith("[06 05 2031]")
