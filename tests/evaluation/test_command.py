"""What `rlhf-ray eval` leaves behind and shows."""

import csv
import io
import json

import pytest
import yaml
from rich.console import Console

from rlhf_ray import cli
from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.load import load_config
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.evaluation import command
from rlhf_ray.evaluation.command import add_ratings, run_eval
from rlhf_ray.evaluation.table import print_evaluation, rows_of


@pytest.fixture
def path(folders, tmp_path):
    tree = {
        "name": "tiny",
        "device": "cpu",
        "models": {"base": str(folders / "base"), "tuned": {"path": str(folders / "tuned"), "dtype": "float32"}},
        "data": {"path": "task:arithmetic", "limit": 3, "max_prompt_tokens": 8},
        "sampling": {"samples_per_prompt": 2, "max_new_tokens": 6},
        "rewards": [{"function": "exact_answer"}],
        "ratings": {"prompts": 2},
    }
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def answers(table):
    table(base=(lambda r, m: "[0]", 0.5), tuned=(lambda r, m: r.columns["answer"], 0.5))


def test_the_run_directory(path, answers, tmp_path):
    config = load_config(path, [], EvalRunConfig)
    result = run_eval(config, tmp_path / "run")
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} - {".lock"} == {
        "config.yaml", "eval.json", "summary.json", "answers", "ratings.csv", "ratings_key.json"}  # fmt: skip
    kept = load_config(run / "config.yaml", [], EvalRunConfig)
    assert kept == config.model_copy(update={"clock": kept.clock}) and kept.clock is not None
    saved = json.loads((run / "eval.json").read_text())
    assert saved == {name: value for name, value in result.items() if name != "run_dir"}
    assert saved["models"]["tuned"]["metrics"]["reward"] == 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["models"]["base"]["accuracy"] == 0.0
    rows = [json.loads(line) for line in (run / "answers" / "tuned.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and [r["prompt_id"] for r in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[0]["prompt"].endswith("=") and rows[0]["rewards"] == {"exact_answer": 1.0} and rows[0]["tokens"] >= 2


def test_ratings_come_back(path, answers, tmp_path):
    run = tmp_path / "run"
    run_eval(load_config(path, [], EvalRunConfig), run)
    with (run / "ratings.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4, "two prompts, two models, one answer each"
    filled = tmp_path / "filled.csv"
    with filled.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            rating = 3 if "[" in row["answer"] else 9
            writer.writerow({**row, "helpful": rating, "harmless": rating, "honest": rating})
    result = add_ratings(run, [filled])
    assert (result["ratings"]["base"]["helpful"], result["ratings"]["tuned"]["honest"]) == (3, 9)
    assert json.loads((run / "eval.json").read_text())["ratings"] == result["ratings"]
    assert ("helpful (people, 1-10)", ["3.000", "9.000"]) in rows_of(result)
    with pytest.raises(DataError, match="holds no eval.json"):
        add_ratings(tmp_path, [filled])


def test_the_table_shows_brackets_as_they_are(path, answers, tmp_path):
    result = run_eval(load_config(path, [], EvalRunConfig), tmp_path / "run")
    screen = io.StringIO()
    print_evaluation({**result, "alarms": ["tuned: perplexity is 20% above"]}, Console(file=screen, width=120))
    shown = screen.getvalue()
    assert "[0]  [0.00]" in shown and "ALARM tuned: perplexity" in shown
    rows = dict(rows_of(result))
    assert rows["reward"] == ["0.000", "1.000"] and rows["win rate by reward"][0] == ""
    assert rows["win rate by reward"][1].startswith("1.000 [0.") and rows["win rate by reward"][1].endswith("1.000]")


def test_an_error_leaves_a_summary_that_says_so(path, answers, tmp_path):
    config = load_config(path, ["sampling.max_new_tokens=50"], EvalRunConfig)
    with pytest.raises(ConfigError, match="positions"):
        run_eval(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "positions" in summary["error"]
    run_eval(load_config(path, [], EvalRunConfig), tmp_path / "run")


def test_an_interrupted_one_did_not_fail(path, answers, tmp_path, monkeypatch):
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_eval(load_config(path, [], EvalRunConfig), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_the_command(path, answers, tmp_path, capsys):
    cli.app(["eval", str(path), "data.limit=2", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    output = capsys.readouterr().out
    assert "2 prompts, 2 answers each" in output and f"Everything is in {tmp_path / 'run'}" in output
    cli.app(["eval", str(path), "--dry-run"], standalone_mode=False)
    assert yaml.safe_load(capsys.readouterr().out)["models"]["base"]["path"].endswith("base")
