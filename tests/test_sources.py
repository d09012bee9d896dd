"""Runs over several sources: columns and templates of their own, metrics by source, and what a resume refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.load import load_config, parse_config
from rlhf_ray.config.supervised import SCHEMAS
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.start.rl import run_rl
from rlhf_ray.start.supervised import run_supervised

pytestmark = pytest.mark.slow

REWARD = """
def right(prompts, completions, gold, data_source):
    assert set(data_source) <= {"sums", "words"} and len(gold) == len(completions)
    return [None if g is None else float(g in c) for g, c in zip(gold, completions)]

def length(prompts, completions):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def write(tmp_path):
    def write(name: str, *rows: dict[str, Any]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def rl(tmp_path, tiny_tree, write):
    """Two files with other columns: questions with a gold answer, and texts to go on with."""
    sums = write("sums.jsonl", *({"question": f"{n}+{n}=", "gold": str(2 * n)} for n in range(8)))
    words = write("words.jsonl", *({"text": f"a b {letter}"} for letter in "cdefgh"))
    (tmp_path / "reward.py").write_text(REWARD)
    tree = tiny_tree | {
        "steps": 3,
        "data": {"eval_size": 4, "max_prompt_tokens": 16, "sources": [
            {"path": sums, "weight": 3, "field": "question"},
            {"path": words, "weight": 1, "prompt_words": 2},
        ]},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 2},
        "rewards": [{"function": f"{tmp_path}/reward.py:{name}", "isolated": False} for name in ("right", "length")],
        "eval": {"size": 4, "every": 2},
    }  # fmt: skip
    path = tmp_path / "rl.yaml"
    path.write_text(yaml.safe_dump(tree))
    return lambda *overrides: load_config(path, overrides)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_rl_draws_by_weight_and_reports_by_source(rl, tmp_path, capsys):
    summary = run_rl(rl(), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [(row["source/sums/count"], row["source/words/count"]) for row in rows] == [(6, 2)] * 3
    # 4 of 14 rows are held out: 2 of 8 sums (2.29), 2 of 6 words (1.71).
    assert [row["source/sums/epochs"] for row in rows] == [0.5, 1.0, 1.5]
    assert [row["source/words/epochs"] for row in rows] == [0.25, 0.5, 0.75]
    for row in rows:
        mixed = (6 * row["source/sums/reward/mean"] + 2 * row["source/words/reward/mean"]) / 8
        assert row["reward/mean"] == pytest.approx(mixed)
        assert "source/sums/reward/right" in row and "source/words/reward/right" not in row, "not theirs to judge"
    assert {"eval/source/sums/reward", "eval/source/words/reward"} <= rows[1].keys()
    assert {"source/sums/reward", "source/words/reward/length"} <= summary["after"].keys()
    written = (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in written] == ["sums"] * 6 + ["words"] * 2
    said = capsys.readouterr().out
    assert "sources: sums 75.0% (6 rows), words 25.0% (4 rows); drawn by weight" in said.replace("\n", " ")
    shown = [sample["prompt"] for sample in summary["after"]["samples"]]
    assert shown == ["6+6=", "a b", "7+7=", "a b"]


def test_a_resumed_rl_run_goes_on_in_the_mixture_and_refuses_another(rl, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_rl(rl(), whole)
    run_rl(rl("steps=2"), parts)
    refused = {
        "data.sources.0.weight=2": (ConfigError, "data.sources has changed"),
        "data.sources.1.limit=3": (ConfigError, "data.sources has changed"),
    }
    for override, (kind, message) in refused.items():
        with pytest.raises(kind, match=message):
            run_rl(rl(override), parts, resume=True)
    words = tmp_path / "words.jsonl"
    content = words.read_text()
    words.write_text(content.replace("a b e", "a b z"))
    with pytest.raises(DataError, match=rf"the data has changed .*: words \({words}\) .6 rows as before"):
        run_rl(rl(), parts, resume=True)
    words.write_text(content)
    run_rl(rl(), parts, resume=True)
    names = ("reward/mean", "source/sums/reward/mean", "source/words/epochs", "loss/policy", "grad_norm")
    assert [[row[name] for name in names] for row in rows_of(parts)] == [
        [row[name] for name in names] for row in rows_of(whole)
    ]


def test_rewards_may_be_scaled_by_source(rl, tmp_path):
    """Without a column that names it, the source does."""
    summary = run_rl(rl("algorithm.normalize_rewards=source", "steps=1"), tmp_path / "run")
    assert summary["status"] == "finished"


ASKED = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
WRITTEN = [{"text": f"{a}{a}={a}"} for a in range(10)]
COMPARED = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "0"} for a in range(1, 5) for b in range(4)]
RANKED = [{"prompt": f"{a}-{a}=", "completions": ["0", str(a)]} for a in range(1, 9)]
LABELLED = [{"text": f"{a}{b}{a}", "label": int(a > 4)} for a in range(10) for b in range(2)]
FIRST = {"sft": ASKED, "rm": COMPARED, "dpo": COMPARED, "classifier": LABELLED}
SECOND = {"sft": WRITTEN, "rm": RANKED, "dpo": RANKED, "classifier": [{"review": "99", "stars": 1}] * 3 + [
    {"review": f"{n}1", "stars": n % 2} for n in range(6)]}  # fmt: skip


@pytest.fixture
def supervised(write):
    def make(command: str, **changes: Any):
        columns = {"sft": {"prompt": "question", "completion": "answer"}}.get(command, {})
        others = {"classifier": {"text": "review", "label": "stars"}}.get(command, {})
        tree = {
            "name": command, "device": "cpu", "steps": 4,
            "model": {
                "path": "scratch:bert" if command == "classifier" else "scratch:qwen2",
                "tokenizer": {"path": "scratch:char"},
                "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 16},
            },
            "data": {"eval_size": 6, "max_length": 16, "sources": [
                {"path": write("first.jsonl", *FIRST[command]), "weight": 3, "columns": columns},
                {"path": write("second.jsonl", *SECOND[command]), "weight": 1, "columns": others},
            ]},
            "learner": {"batch_size": 8, "lr": 1e-2}, "eval": {"every": 2}, "logging": {"loggers": []},
        }  # fmt: skip
        return parse_config({**tree, **changes}, SCHEMAS[command], source="the test")

    return make


@pytest.mark.parametrize("command", ["sft", "rm", "dpo", "classifier"])
def test_supervised_runs_draw_by_weight_and_report_by_source(supervised, tmp_path, command):
    summary = run_supervised(supervised(command), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [(row["source/first/count"], row["source/second/count"]) for row in rows] == [(6, 2)] * 4
    assert rows[-1]["source/first/epochs"] == pytest.approx(24 / summary_rows(tmp_path, "first"))
    for row in rows:
        assert {"source/first/loss", "source/second/loss"} <= row.keys()
        if command != "sft":  # whose loss is a mean over tokens
            mixed = (6 * row["source/first/loss"] + 2 * row["source/second/loss"]) / 8
            assert row["loss"] == pytest.approx(mixed)
    assert "val/source/first/loss" in rows[1] and "val/source/second/loss" in summary["after"]
    assert summary["before"]["train/source/second/count"] + summary["before"]["train/source/first/count"] > 8


def summary_rows(tmp_path: Path, name: str) -> int:
    """How many rows of a source were learned from: all, without those held out."""
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["before"]
    return summary[f"train/source/{name}/count"]


def test_a_resumed_supervised_run_goes_on_in_the_mixture(supervised, tmp_path):
    constant = {"batch_size": 8, "lr": 1e-2, "lr_schedule": "constant"}
    run_supervised(supervised("sft", steps=2, learner=constant), tmp_path / "parts")
    second = tmp_path / "second.jsonl"
    changed = supervised("sft", learner=constant)
    second.write_text(second.read_text().replace("33=3", "33=4"))
    with pytest.raises(DataError, match=rf"the data has changed .*: {second} .10 rows as before"):
        run_supervised(changed, tmp_path / "parts", resume=True)
    run_supervised(supervised("sft", learner=constant), tmp_path / "parts", resume=True)
    run_supervised(supervised("sft", learner=constant), tmp_path / "constant")
    parts, whole = ([row["loss"] for row in rows_of(tmp_path / name)] for name in ("parts", "constant"))
    assert parts == whole


def test_an_epoch_is_as_many_rows_as_all_sources_have(supervised, tmp_path):
    """20 + 10 rows, 6 held out, batches of 8: 3 steps; without weights each row comes once in them."""
    config = supervised("sft", steps=None, epochs=1)
    sources = [source.model_copy(update={"weight": None}) for source in config.data.sources]
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})
    assert run_supervised(config, tmp_path / "run")["steps"] == 3
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["source/first/epochs"] == rows[-1]["source/second/epochs"] == 1.0
    assert sum(row["source/first/count"] + row["source/second/count"] for row in rows) == 24
