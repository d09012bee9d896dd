"""`rlhf-ray init`: what it writes passes a dry run and trains, for every command; and what it asks and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rlhf_ray import cli

EXAMPLES = {"sft": "instruction", "rm": "preference", "dpo": "preference", "rl": "prompt_completion"}


@pytest.fixture
def rlhf_ray(tmp_path, monkeypatch):
    """The command in an empty folder: its exit status, and all that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, said: str | None = None) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, list(map(str, arguments)), input=said)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return 2, f"{done.output}{type(done.exception).__name__}: {done.exception}"
        return done.exit_code, done.output

    return run


def written(file: str = "rl.yaml") -> dict:
    return yaml.safe_load(Path(file).read_text(encoding="utf-8"))


def write_rows(file: str, *rows: dict) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def sums(count: int = 12) -> str:
    return write_rows("sums.jsonl", *({"frage": f"{n}+{n}=", "antwort": str(2 * n)} for n in range(count)))


def told_to_run(output: str) -> list[list[str]]:
    return [line.split()[1:] for line in output.partition("Next:")[2].splitlines() if line.startswith("  rlhf-ray")]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["scratch:qwen2", "scratch:lstm"])
@pytest.mark.parametrize("command", EXAMPLES)
def test_with_nothing_given_it_runs_at_once(rlhf_ray, command, model):
    status, output = rlhf_ray("init", "--command", command, "--model", model)
    assert status == 0 and f"60 rows of type {EXAMPLES[command]}" in output
    assert Path("reward.py").exists() == (command == "rl")
    for arguments in told_to_run(output):  # validate-data, the dry run, the run
        small = ["steps=2", *(["warm_start.steps=2"] if command == "rl" else [])] if len(arguments) == 2 else []
        status, said = rlhf_ray(*arguments, *small)
        assert status == 0, (arguments, said)
    (run,) = Path("runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert run.name.startswith(command) and summary["status"] == "finished" and summary["steps"] == 2


@pytest.mark.slow
def test_ones_own_file_columns_and_reward(rlhf_ray):
    flags = ("--data", sums(), "--column", "prompt=frage", "--column", "completion=antwort")
    flags += ("--reward", "rewards/mine.py:near", "--out", "conf/run.yaml")
    status, output = rlhf_ray("init", "--command", "rl", *flags)
    assert status == 0 and "--column prompt=frage --column completion=antwort" in output
    reward = Path("rewards/mine.py").read_text()
    assert "def near(" in reward and "columns['antwort']" in reward
    config = written("conf/run.yaml")
    assert config["data"]["field"] == "frage" and config["warm_start"]["completion"] == "antwort"
    for arguments in told_to_run(output):
        small = ("steps=2", "warm_start.steps=2", "--run-dir", "runs/mine") if len(arguments) == 2 else ()
        status, said = rlhf_ray(*arguments, *small)
        assert status == 0, (arguments, said)
    scores = [json.loads(line)["reward/near"] for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [
    [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}]}
     for n in range(9)],
    [{"text": f"The {n} small rivers run to the sea, and the sea is never full."} for n in range(9)],
], ids=["messages", "texts"])  # fmt: skip
@pytest.mark.parametrize("command", ["rl", "sft"])
def test_conversations_and_texts(rlhf_ray, command, rows):
    file = write_rows("rows.jsonl", *rows)
    assert rlhf_ray("init", "--command", command, "--data", file)[0] == 0
    small = ("steps=2", *(("warm_start.steps=2",) if "warm_start" in written(f"{command}.yaml") else ()))
    status, said = rlhf_ray(command, f"{command}.yaml", *small)
    assert status == 0, said


@pytest.mark.slow
def test_a_model_folder_and_a_reward_model(rlhf_ray):
    rlhf_ray("init", "--command", "sft")
    rlhf_ray("sft", "sft.yaml", "steps=1", "--run-dir", "a")
    rlhf_ray("init", "--command", "rm", "--model", "a/model")
    status, said = rlhf_ray("rm", "rm.yaml", "steps=1", "--run-dir", "b")
    assert status == 0, said
    flags = ("--model", "a/model", "--reward-model", "b/model", "--out", "ppo.yaml")
    status, said = rlhf_ray("init", "--command", "rl", *flags)
    assert status == 0 and not Path("reward.py").exists() and "warm_start" not in written("ppo.yaml"), said
    status, said = rlhf_ray("rl", "ppo.yaml", "steps=1")
    assert status == 0, said


def test_a_dialogue(rlhf_ray):
    """Wrong answers are asked again; columns are asked where no type fits; numbers name options."""
    said = ["nonsense", "4", "absent.jsonl", sums(), "nowhere", "frage", "1", "scratch:bert", "1", "sentimant",
            "reward.py:near", "mars", "local", "my.yaml"]  # fmt: skip
    status, output = rlhf_ray("init", said="\n".join(said) + "\n")
    assert status == 0, output
    for refusal in ("'nonsense' is none of sft", "absent.jsonl: no such file", "there is no column 'nowhere'",
                    "scratch:bert: no such model", "did you mean 'sentiment'?", "'mars' is neither local"):  # fmt: skip
        assert output.count(refusal) == 1, refusal
    assert "sums.jsonl: 12 rows of type prompt; columns frage, antwort" in output
    config = written("my.yaml")
    assert config["data"]["path"] == "sums.jsonl" and config["data"]["field"] == "frage"
    assert config["warm_start"]["completion"] == "antwort" and config["rewards"][0]["function"] == "reward.py:near"
    assert [line[0] for line in told_to_run(output)] == ["validate-data", "rl", "rl"]


def test_return_alone_takes_every_default(rlhf_ray):
    status, output = rlhf_ray("init", said="\n" * 6)
    assert status == 0, output
    asked = Path("rl.yaml").read_text()
    assert rlhf_ray("init", "--yes", "--force")[0] == 0
    assert Path("rl.yaml").read_text() == asked, "--yes answers the same"


def test_what_is_given_is_not_asked(rlhf_ray):
    status, output = rlhf_ray("init", "--data", sums(), "--column", "prompt=frage", "--where", "ray", said="rl\n\n\n\n")
    assert status == 0, output
    assert "Which data?" not in output and "Where?" not in output and "Which model?" in output
    assert written()["executor"] == "ray"


def test_nobody_there_to_answer(rlhf_ray):
    status, output = rlhf_ray("init", said="rl\n")
    assert status == 2 and "give --command" in output and not Path("rl.yaml").exists()


def test_nothing_is_overwritten(rlhf_ray):
    Path("rl.yaml").write_text("mine: 1\n")
    status, output = rlhf_ray("init", "--yes")
    assert status == 2 and "rl.yaml: already there" in output
    assert Path("rl.yaml").read_text() == "mine: 1\n" and not Path("reward.py").exists(), "all or nothing"
    assert rlhf_ray("init", "--yes", "--force")[0] == 0 and written()["name"] == "rl"
    Path("reward.py").write_text("def score(completions, **columns):\n    return [1.0 for _ in completions]\n")
    assert rlhf_ray("init", "--yes", "--force")[0] == 0
    assert "1.0 for _" in Path("reward.py").read_text(), "a reward that is there is used, not replaced"


def test_example_rows_that_were_changed_are_data(rlhf_ray):
    assert rlhf_ray("init", "--yes")[0] == 0
    write_rows("example_rl.jsonl", *({"prompt": f"{n}", "answer": "x"} for n in range(5)))
    status, output = rlhf_ray("init", "--yes", "--force")
    assert status == 0 and "example_rl.jsonl: 5 rows" in output
    assert len(Path("example_rl.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(("flags", "says"), [
    (("--command", "ppo"), "Invalid value for '--command'"),
    (("--command", "dpo", "--data", "sums.jsonl"), "are not what `dpo` reads"),
    (("--command", "rl", "--model", "scratch:bert"), "no such model is built here"),
    (("--command", "rl", "--reward", "judge"), "needs settings of its own"),
    (("--command", "rl", "--data", "absent.jsonl"), "no such file"),
    (("--command", "rl", "--column", "prompt"), "no role=column pair"),
    (("--command", "sft", "--reward", "sentiment"), "--reward is for rl"),
])  # fmt: skip
def test_refusals(rlhf_ray, flags, says):
    sums()
    status, output = rlhf_ray("init", *flags)
    assert status == 2 and says in output
    assert not list(Path().glob("*.yaml"))
