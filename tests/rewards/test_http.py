"""The reward server and its client: batches, tokens, servers that are away, busy, slow or talk nonsense."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.calling import RewardFunction
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.failures import FailurePolicy
from rlhf_ray.rewards.server import RewardServer

ROWS = (["p", "q", "p"], ["one", "three", "x"], [[1], [2, 3], []], [{"answer": "one"}, {"answer": "two"}, {"n": 3}])


@contextmanager
def serving(*functions, **settings):
    server = RewardServer(RewardSet(functions), **settings)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


@contextmanager
def fake(answers):
    """A server that gives these (status, body) in turn, the last one for ever, and remembers what it was sent."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answers[min(len(seen), len(answers)) - 1]
            body = body(seen[-1]) if callable(body) else body
            if status is None:
                time.sleep(body)
                return
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def score(url, policy="raise", timeout_s=60.0, **args):
    reward = load_reward(url, name="remote", policy=FailurePolicy(policy), timeout_s=timeout_s, args=args)
    return RewardSet([reward]).score(*ROWS)


def post(url, body, **headers):
    """(status, answer)"""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data=data, headers=headers), timeout=60) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_same_numbers_as_without_a_server():
    def same(completions, answer):
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    penalty = load_reward("length_penalty", weight=0.5, args={"free_tokens": 1, "per_token": 1.0})
    functions = [penalty, RewardFunction("same", same)]
    here = RewardSet(functions).score(*ROWS)
    with serving(*functions) as server:
        assert score(server.url).total == here.total == [1.0, -0.5, 0.0]
        status, answer = post(f"{server.url}/score", {"completions": ["a"], "columns": {"answer": ["a"]}})
        assert status == 200 and answer["scores"] == {"length_penalty": [0.0], "same": [1.0]}
        with urlopen(f"{server.url}/health", timeout=60) as response:
            assert json.loads(response.read()) == {"status": "ok", "rewards": ["length_penalty", "same"]}


def test_batches_go_out_together_and_come_back_in_order():
    all_there = threading.Barrier(4)

    def lengths(body):
        all_there.wait(60)  # raises, and so closes the connection, if they come one after the other
        return {"scores": {"f": [len(text) for text in body["completions"]]}}

    with fake([(200, lengths)]) as (url, seen):
        reward = load_reward(url, args={"batch_size": 3, "connections": 4})
        texts = ["x" * n for n in range(10)]
        rewards = RewardSet([reward]).score([""] * 10, texts, [[]] * 10, [{"n": n} for n in range(10)])
    assert rewards.total == list(range(10))
    assert sorted(len(body["completions"]) for body in seen) == [1, 3, 3, 3]
    assert seen[0].keys() == {"prompts", "completions", "completion_ids", "columns"}
    assert all(body["columns"]["n"] == [len(text) for text in body["completions"]] for body in seen)


def test_the_token(monkeypatch):
    monkeypatch.setenv("RIGHT", "open sesame")
    monkeypatch.setenv("WRONG", "open barley")
    with serving(RewardFunction("one", lambda completions: [1.0] * len(completions)), token="open sesame") as server:
        assert score(server.url, token_env="RIGHT").total == [1.0] * 3
        for args in ({"token_env": "WRONG"}, {}):
            with pytest.raises(ConfigError, match="refuses the token .HTTP 401.; set token_env"):
                score(server.url, policy="drop_group", **args)
        for header in ("", "open sesame", "Bearer open sesam", "Bearer open sesame!", "Bearer \u00e4"):
            assert post(f"{server.url}/score", {"completions": []}, Authorization=header)[0] == 401
    monkeypatch.delenv("RIGHT")
    with pytest.raises(ConfigError, match="token_env=RIGHT: this environment variable is not set"):
        load_reward(server.url, args={"token_env": "RIGHT"})


def test_a_server_that_is_busy_or_restarting_is_asked_again():
    good = (200, {"scores": {"f": [1.0, 2.0, 3.0]}})
    with fake([(503, {}), (429, {}), good]) as (url, seen):
        rewards = score(url)
        assert rewards.total == [1.0, 2.0, 3.0] and rewards.stats["fault/retries"] == 2.0 and len(seen) == 3
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    late = threading.Timer(0.5, lambda: running.append(RewardServer(RewardSet([constant]), port=port)))
    constant, running = RewardFunction("one", lambda completions: [1.0] * len(completions)), []
    late.start()
    answer = []
    asking = threading.Thread(target=lambda: answer.append(score(f"http://127.0.0.1:{port}", timeout_s=60).total))
    asking.start()
    late.join()
    serving_late = threading.Thread(target=running[0].serve)
    serving_late.start()
    asking.join()
    running[0].close()
    serving_late.join()
    assert answer == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, b"<html>hello</html>"), "got something else than scores .*<html>hello</html>; it must be"),
        ((200, {"rewards": [1]}), "got something else than scores"),
        ((200, {"scores": {"a": [1.0] * 3, "b": [1.0] * 3}}), "got something else than scores"),
        ((200, {"scores": {"a": [1.0]}}), "returned 1 scores for 3 completions"),
        ((200, b'{"scores": {"a": [NaN, 1, 1]}}'), "gave nan for row 0"),
        ((200, {"scores": {"a": [1.0, None, 1.0]}}), "gave None for row 1"),
        ((200, {"scores": {"a": "111"}}), "returned a str"),
        ((500, {"error": "reward 'x' raised"}), "got HTTP 500 .*: reward 'x' raised; see the server's log"),
        ((302, {}), "got HTTP 302 .*, a redirect to another address; none is followed"),
        ((200, b"\x1b]0;a\x07"), r"got something else than scores from \S+: \\x1b\]0;a\\x07; it must be"),
        ((500, {"error": "\x1b[2J\u202e"}), r"got HTTP 500 from \S+: \\x1b\[2J\\u202e; see"),
        ((None, 3.0), r"had no scores .*within 0.5 s \(no answer\); see whether the server runs"),
        ((503, {}), r"had no scores .*within 0.5 s \(HTTP 503\)"),
    ],
)
def test_what_a_server_may_do_wrong(answer, says):
    with fake([answer]) as (url, _):
        with pytest.raises(RewardError, match=f"reward 'remote' {says}"):
            score(url, timeout_s=0.5)
        assert score(url, policy="drop_group", timeout_s=0.5).keep.count(False) > 0


def test_nobody_listens():
    with pytest.raises(RewardError, match="had no scores from http://127.0.0.1:9/score within 0.5 s .*Connect"):
        score("http://127.0.0.1:9", timeout_s=0.5)
    with fake([(404, {})]) as (url, _), pytest.raises(ConfigError, match="has no such path .HTTP 404."):
        score(f"{url}/elsewhere", policy="drop_group")


def test_settings_of_the_client():
    assert load_reward("http://host:8000/").function.url == "http://host:8000/score"
    assert load_reward("http://host/my/rewards").function.url == "http://host/my/rewards"
    assert load_reward("http://host:8000").name == "host:8000"
    for url, args in (("http://", {}), ("http://host", {"batch_size": 0}), ("http://host", {"batchsize": 4})):
        with pytest.raises(ConfigError):
            load_reward(url, args=args)


def test_columns_that_are_no_json():
    reward = load_reward("http://127.0.0.1:9", name="remote")
    with pytest.raises(RewardError, match="'remote' cannot send the data's columns as JSON"):
        RewardSet([reward]).score(["p"], ["c"], [[1]], [{"image": object()}])


def test_requests_that_the_server_refuses():
    with serving(RewardFunction("one", lambda completions: [1.0] * len(completions)), max_body_mb=0.001) as server:
        url = f"{server.url}/score"
        assert post(f"{server.url}/other", {"completions": []})[0] == 404
        assert post(url, b"{")[0] == 400
        assert post(url, [1])[0] == 400
        assert post(url, {"completions": ["a"], "prompts": []})[0] == 400
        assert post(url, {"completions": ["a"], "columns": {"x": [1, 2]}})[0] == 400
        assert post(url, {"completions": [1]})[0] == 400
        status, answer = post(url, {"completions": ["x" * 2000]})
        assert status == 413 and "max_body_mb" in answer["error"]
        assert post(url, {"completions": ["a"]}) == (200, {"scores": {"one": [1.0]}, "total": [1.0], "events": []})


def test_a_port_that_is_taken():
    with serving(RewardFunction("one", lambda completions: [1.0])) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is taken by another program; choose another"):
            RewardServer(RewardSet([]), port=port)


def test_an_answer_cannot_fill_the_memory():
    large = (200, b" " * (2**24 + 1))
    with fake([large]) as (url, _), pytest.raises(RewardError, match="got more than 16777216 bytes"):
        score(url)


def test_a_redirect_is_not_followed_and_a_compressed_answer_is_not_unpacked():
    with fake([(200, {"scores": {"f": [1.0] * 3}})]) as (elsewhere, seen):

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                encodings.append(self.headers["Accept-Encoding"])
                self.rfile.read(int(self.headers["Content-Length"]))
                moved = self.path == "/moved"
                body = b"" if moved else gzip.compress(b" " * 10**8)
                self.send_response(307 if moved else 200)
                for name, value in {"Location": f"{elsewhere}/score?k=s7", "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        encodings = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(RewardError, match="a redirect to") as error:
            score(f"{url}/moved")
        assert f"a redirect to {elsewhere}/score?k=***; none is followed" in str(error.value)
        with pytest.raises(RewardError, match="got something else than scores"):
            score(f"{url}/packed")
        server.shutdown()
        server.server_close()
    assert seen == [] and encodings == ["identity"] * 2


def test_secrets_in_a_url_are_sent_and_said_nowhere(monkeypatch):
    monkeypatch.setenv("TOKEN", "tok7")
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.headers["Authorization"]))
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": f"no: {self.headers['Authorization']} at http://h?token=q7"}).encode()
            self.send_response(500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    host = f"127.0.0.1:{server.server_address[1]}"
    said = []
    for url, args in [(f"http://ada:pw7@{host}", {}), (f"http://{host}?key=q7", {"token_env": "TOKEN"})]:
        reward = load_reward(url, args=args)
        assert reward.name == host
        with pytest.raises(RewardError) as error:
            RewardSet([reward]).score(*ROWS)
        said.append(str(error.value))
    server.shutdown()
    server.server_close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://ada:pw7@127.0.0.1:{taken.getsockname()[1]}?key=q7"
    with pytest.raises(RewardError, match="had no scores") as error:
        score(nobody, timeout_s=0.1)
    for text in [*said, str(error.value)]:
        assert not {"pw7", "q7", "tok7"} & set(re.findall(r"\w+", text)) and "127.0.0.1" in text
    basic = base64.b64encode(b"ada:pw7").decode()
    assert seen == [("/score", f"Basic {basic}"), ("/score?key=q7", "Bearer tok7")]


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"nonsense": 1}])
def test_a_wrong_setting_shows_no_secret(settings):
    with pytest.raises(ConfigError) as error:
        load_reward("http://ada:pw7@host", args=settings)
    assert "pw7" not in str(error.value)
