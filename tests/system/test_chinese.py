"""Text without blanks, end to end: a small model learns Chinese and then to write friendly reviews, and an evaluation
tells a model that has collapsed from one that has not.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rlhf_ray.models.loading import load_tokenizer

pytestmark = [pytest.mark.system, pytest.mark.timeout(1400)]

RL, EVAL, DATA = "configs/grpo_chinese.yaml", "configs/eval_chinese.yaml", "configs/data/chinese_reviews.jsonl"


@pytest.fixture(scope="module")
def grpo(rlhf_ray, tmp_path_factory):
    return rlhf_ray("rl", RL, "device=cpu", run_dir=tmp_path_factory.mktemp("chinese") / "run")


@pytest.fixture(scope="module")
def collapsed(rlhf_ray, grpo, repo_root: Path, tmp_path_factory) -> Path:
    """The same model, taught to write one character over and over."""
    folder = tmp_path_factory.mktemp("collapsed")
    texts = [json.loads(line)["text"] for line in (repo_root / DATA).read_text(encoding="utf-8").splitlines()]
    rows = [json.dumps({"text": text[:10] + "好" * 30}, ensure_ascii=False) for text in texts]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = rlhf_ray(
        "sft", "configs/sft_reviews.yaml", f"model.path={grpo.run_dir / 'start'}", "model.tokenizer.path=null",
        f"data.path={folder / 'rows.jsonl'}", "data.eval_size=0", "eval.patience=null",
        "data.cleaning.duplicates=false", "epochs=2",
        "device=cpu", run_dir=folder / "run",
    )  # fmt: skip
    return run.run_dir / "model"


def test_it_learns_to_write_friendly_reviews(grpo):
    before, after = grpo.summary["before"], grpo.summary["after"]
    assert after["reward"] >= before["reward"] + 0.2
    assert after["reward/praise"] > before["reward/praise"]
    assert after["reward/complaint"] < before["reward/complaint"]
    assert after["distinct_2"] >= 0.6 * before["distinct_2"]
    for sample in after["samples"]:
        assert len(sample["prompt"]) == 10, "characters, for prompt_words counts those"
        assert " " not in sample["prompt"] + sample["completion"], "nobody writes blanks there"


def test_the_tokenizer_has_a_token_for_each_character(grpo, repo_root):
    tokenizer = load_tokenizer(grpo.run_dir / "model")
    texts = [json.loads(line)["text"] for line in (repo_root / DATA).read_text(encoding="utf-8").splitlines()]
    text = random.Random(0).choice(texts[:600])
    assert tokenizer.tokenize(text) == list(text)
    assert tokenizer.batch_decode(tokenizer(texts[:600]).input_ids) == texts[:600]


def test_a_collapsed_model_looks_collapsed(rlhf_ray, grpo, collapsed, tmp_path):
    models = [f"models.warm-start={grpo.run_dir / 'start'}", f"models.grpo={grpo.run_dir / 'model'}"]
    rlhf_ray("eval", EVAL, *models, f"models.collapsed={collapsed}", "device=cpu", run_dir=tmp_path / "eval")
    evaluated = json.loads((tmp_path / "eval" / "eval.json").read_text(encoding="utf-8"))["models"]
    start, after, broken = (evaluated[name]["metrics"] for name in ("warm-start", "grpo", "collapsed"))
    for healthy in (start, after):
        assert healthy["distinct_1"] > 0.1 and healthy["distinct_2"] > 0.2 and healthy["distinct_2_tokens"] > 0.2
        assert healthy["self_bleu"] < broken["self_bleu"] - 0.1, "short reviews of one kind have much in common"
    assert broken["distinct_1"] < 0.02 and broken["distinct_2"] < 0.02 and broken["distinct_2_tokens"] < 0.02
    assert broken["self_bleu"] > 0.95
    assert after["reward"] > start["reward"] + 0.2 > broken["reward"]
