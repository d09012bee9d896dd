"""The rows that come with the package: found from anywhere, made by their grammars, right, and new in the tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from rlhf_ray.config.shipped import shipped_rows
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.types import detect
from rlhf_ray.errors import DataError

TYPES = {
    "reviews.train": "labelled", "reviews.test": "labelled", "dialogues.train": "preference",
    "dialogues.test": "preference", "tasks": "instruction", "problems.train": "prompt_completion",
    "problems.test": "prompt_completion",
}  # fmt: skip


def rows_of(name: str) -> list[dict]:
    return [row.fields for row in read_rows(f"shipped:{name}.jsonl")]


def test_they_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, kind in TYPES.items():
        first, *rest = read_rows(f"shipped:{name}.jsonl")
        assert detect(first) == kind and len(rest) >= 79
        assert first.where == f"{shipped_rows(f'shipped:{name}.jsonl')}:1"


def test_a_file_of_the_same_name_is_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.jsonl").write_text('{"text": "mine"}\n')
    assert [row.fields for row in read_rows("tasks.jsonl")] == [{"text": "mine"}]
    assert "instruction" in rows_of("tasks")[0]


@pytest.mark.parametrize(("name", "says"), [
    ("review.train.jsonl", "did you mean shipped:reviews.train.jsonl?"),
    ("xyz", "there are chinese_reviews.jsonl, dialogues.test.jsonl, "),
    ("../grpo_reviews.yaml", "no rows of this name come with the package"),
    ("", "no rows of this name come with the package"),
])  # fmt: skip
def test_a_name_that_is_none(name, says):
    with pytest.raises(DataError) as error:
        list(read_rows(f"shipped:{name}"))
    assert says in str(error.value)


def test_the_grammars_give_these_very_rows(repo_root, tmp_path):
    script = repo_root / "configs" / "data" / "grammar" / "make_rows.py"
    subprocess.run([sys.executable, "-B", str(script), str(tmp_path)], check=True)
    assert {path.stem for path in tmp_path.iterdir()} == TYPES.keys()
    for path in tmp_path.iterdir():
        committed = repo_root / "configs" / "data" / path.name
        assert path.read_bytes() == committed.read_bytes(), f"{path.name}: `make rows` writes it again"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 600_000


@pytest.mark.parametrize("name", ["reviews", "dialogues", "problems"])
def test_test_rows_are_not_training_rows(name):
    train, test = rows_of(f"{name}.train"), rows_of(f"{name}.test")
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in test}
    words = [set(re.findall(r"[a-z]+", json.dumps(part).lower())) for part in (train, test)]
    assert len(words[1] - words[0]) >= 15, "also words that no training row has"


def test_labels_agree_with_a_lexicon():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    score = SentimentIntensityAnalyzer().polarity_scores
    for name in ("reviews.train", "reviews.test"):
        rows = rows_of(name)
        assert 0.45 < sum(row["label"] for row in rows) / len(rows) < 0.55
        right = [(score(row["text"])["compound"] > 0) == bool(row["label"]) for row in rows]
        assert 0.85 < sum(right) / len(right) < 1, "mixed reviews are hard for it"


def test_answers_of_problems_are_right():
    for row in rows_of("problems.train") + rows_of("problems.test"):
        steps, _, result = row["answer"].rpartition("\n#### ")
        told = re.findall(r"<<([0-9+*/-]+)=(\d+)>>", steps)
        assert len(told) >= 2 and all(eval(sum_) == int(value) for sum_, value in told)
        assert result == told[-1][1]
        given = set(re.findall(r"\d+", row["question"])) | {"2"}  # half, twice
        for i, (sum_, _) in enumerate(told):
            known = given | {value for _, value in told[:i]}
            assert set(re.findall(r"\d+", sum_)) <= known, f"a number from nowhere in {row}"


def test_pairs_differ_in_the_last_answer_and_neither_is_always_the_longer_one():
    for name in ("dialogues.train", "dialogues.test"):
        longer = 0
        for row in rows_of(name):
            chosen, rejected = (row[key].rpartition("\n\nAssistant: ") for key in ("chosen", "rejected"))
            assert chosen[0] == rejected[0] and chosen[0].startswith("\n\nHuman: ") and chosen[2] != rejected[2]
            longer += len(chosen[2]) > len(rejected[2])
        assert 0.3 < longer / len(rows_of(name)) < 0.7
