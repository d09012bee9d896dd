"""Rewards that fail in the middle of a run, and a server that serves one: through the real commands' code."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf_ray.config.load import parse_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.run import loggers
from rlhf_ray.start.rl import run_rl

pytestmark = pytest.mark.slow

# Dies when it is asked for the second time in training (the first call is the evaluation before), and gives NaN for
# the first row of each batch of four.
FAILING = """
import math, os

def flaky(completions, **_):
    if len(completions) == 4 and not os.path.exists(DIED):
        open(DIED, "w").close()
        os._exit(1)
    return [math.nan if len(completions) == 4 and row == 0 else float(len(text))
            for row, text in enumerate(completions)]
"""


@pytest.fixture
def run(tmp_path, tiny_tree):
    (tmp_path / "my_reward.py").write_text(f"DIED = {str(tmp_path / 'died')!r}\n{FAILING}")

    def start(**reward) -> list[dict]:
        """Events of a run of two steps."""
        rewards = [{"function": f"{tmp_path}/my_reward.py:flaky", **reward}, {"function": "repetition_penalty"}]
        config = parse_config({**tiny_tree, "steps": 2, "rewards": rewards}, RunConfig, source="the test")
        run_rl(config, tmp_path / "run")
        return lines("events.jsonl")

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]

    start.lines = lines
    return start


def test_the_run_goes_on_without_the_groups_that_nobody_could_judge(run):
    events = [event for event in run(on_failure="drop_group", retries=1) if event["event"] == "reward_failed"]
    # Step 1: the whole call dies, is repeated, and gives NaN. Step 2: NaN, and then for that group alone a number.
    assert [(event["step"], event["action"], event["rows"]) for event in events] == [
        (1, "drop_group", 1), (2, "retry", 0)]  # fmt: skip
    assert events[0]["reason"].startswith("reward 'flaky' gave nan for row 0")
    metrics = run.lines("metrics.jsonl")
    assert [row["fault/dropped"] for row in metrics] == [1.0, 0.0]
    assert [row["fault/retries"] for row in metrics] == [1.0, 1.0]
    assert all(row["reward/flaky"] is not None and row["loss/policy"] is not None for row in metrics)


def test_by_default_the_run_ends_and_says_why(run):
    with pytest.raises(RewardError, match="reward 'flaky' lost its process, which ended with exit status 1"):
        run()


def test_a_step_without_a_single_judged_group_ends_the_run_and_says_why(run):
    with pytest.raises(RewardError, match="step 1: no group .*reward 'flaky' lost its process, which ended with exit"):
        run(on_failure="drop_group")


def test_an_evaluation_with_answers_that_nobody_could_judge(tmp_path, tiny_tree, monkeypatch, capsys):
    """They do not count; the table shows them; and so it does when the first evaluation is read back from disk."""
    from rlhf_ray import cli

    reward = "def f(completions, **_): return [float('nan') if i == 0 else 1.0 for i in range(len(completions))]"
    (tmp_path / "one_missing.py").write_text(reward)
    function = f"{tmp_path}/one_missing.py:f"
    tree = {**tiny_tree, "rewards": [{"function": function, "on_failure": "drop_group", "name": "mine"}]}
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    for steps in (1, 2):
        command = ["rlhf-ray", "rl", f"{tmp_path}/run.yaml", f"steps={steps}", "--run-dir", f"{tmp_path}/run"]
        monkeypatch.setattr(sys, "argv", [*command, "--resume", "auto"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        assert "[nan]" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["reward/mine"] == summary["after"]["reward/mine"] == 1.0
    assert summary["after"]["samples"][0]["reward"] == "NaN"


def test_a_reward_that_cannot_be_loaded_is_refused_before_anything_starts(run, tmp_path):
    (tmp_path / "my_reward.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match="my_reward.py cannot be run .ZeroDivisionError"):
        run()
    assert not (tmp_path / "run").exists()


def test_serve_reward(tmp_path, tiny_tree, repo_root):
    """The command serves, a run learns from it, Ctrl-C ends it."""
    config = tmp_path / "server.yaml"
    config.write_text("port: 0\ntoken_env: MY_TOKEN\nrewards: [{function: repetition_penalty, weight: 2.0}]\n")
    environment = {**os.environ, "MY_TOKEN": "secret", "PYTHONPATH": str(repo_root), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen([sys.executable, "-m", "rlhf_ray.cli", "serve-reward", str(config)], text=True,
                              env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        said = server.stdout.readline()
        assert said.startswith("serving repetition_penalty at http://127.0.0.1:"), server.stderr.read()
        url = said.split(" at ")[1].split(";")[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MY_TOKEN", "secret")
            rewards = [{"function": url, "name": "remote", "token_env": "MY_TOKEN"}]
            settings = parse_config({**tiny_tree, "rewards": rewards}, RunConfig, source="the test")
            summary = run_rl(settings, tmp_path / "run")
        assert summary["status"] == "finished" and "reward/remote" in summary["after"]
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0 and "secret" not in (tmp_path / "run" / "config.yaml").read_text()
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("rewards: []", "no reward to serve"),
        ("rewards: [{function: sentiment}]\nhost: 0.0.0.0", "set token_env, or host=127.0.0.1"),
        ("rewards: [{function: sentimnt}]", "did you mean 'sentiment'"),
        ("rewards: [{function: sentiment}]\ntoken_env: NOT_SET_ANYWHERE", "environment variable is not set"),
    ],
)
def test_serve_reward_refuses(tmp_path, settings, says, monkeypatch, capsys):
    from rlhf_ray import cli

    (tmp_path / "server.yaml").write_text(settings)
    monkeypatch.setattr(sys, "argv", ["rlhf-ray", "serve-reward", str(tmp_path / "server.yaml")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_secrets_in_a_url_reach_no_file_no_logger_and_no_screen(tmp_path, tiny_tree, monkeypatch, capfd):
    """The server lets nobody in without them, and quotes them in its third answer, which fails."""
    told, real = [], loggers.LOGGERS["tensorboard"]
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda run, *given: told.append(given) or real(run, *given))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            allowed = self.path == "/score?token=q7secret" and self.headers["Authorization"] == f"Basic {basic}"
            seen.append(allowed)
            answer = {"scores": {"f": [1.0] * len(body["completions"])}}
            if len(seen) == 3:
                answer["scores"]["f"][0], answer["failed"] = None, [[0, f"failed at {url}"]]
            body = json.dumps(answer).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    seen, basic = [], base64.b64encode(b"ada:pw7secret").decode()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    host = f"127.0.0.1:{server.server_address[1]}"
    url = f"http://ada:pw7secret@{host}/score?token=q7secret"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    rewards = [{"function": url, "on_failure": "drop_group"}, {"function": "repetition_penalty"}]
    tree = {**tiny_tree, "steps": 3, "rewards": rewards, "logging": {"loggers": ["tensorboard"]}}
    run_rl(parse_config(tree, RunConfig, source="the test"), tmp_path / "run")
    again = {**tree, "steps": 4, "rewards": [{"function": url}, rewards[1]]}  # what fails now ends the run
    run_rl(parse_config(again, RunConfig, source="the test"), tmp_path / "run", resume=True)
    server.shutdown()
    server.server_close()
    gone = {**again, "steps": 5, "rewards": [{"function": url, "timeout_s": 0.5}, rewards[1]]}
    with pytest.raises(RewardError) as error:
        run_rl(parse_config(gone, RunConfig, source="the test"), tmp_path / "run", resume=True)
    assert all(seen) and len(seen) >= 5
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name.split(".")[0] for path in files}
    assert {"config", "metrics", "events", "summary", "beginning"} <= names
    for path in files:
        assert b"7secret" not in path.read_bytes() and basic.encode() not in path.read_bytes(), path
    assert f"http://***@{host}/score" in str(told) and "7secret" not in str(told)
    assert f'"reward/{host}":' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "7secret" not in str(error.value) + "".join(capfd.readouterr())
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert f"(failed at http://***@{host}/score?token=***)" in events
