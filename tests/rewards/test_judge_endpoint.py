"""The judge behind HTTP, against a small server that says what each test wants."""

import asyncio
import contextlib
import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.failures import Failure
from rlhf_ray.rewards.judge import compare_both_orders, open_judge
from rlhf_ray.rewards.judge_questions import Opinion


class Server:
    """`reply(body)` gives the text of the assistant, or (status, text of an error)."""

    def __init__(self):
        self.reply = lambda body: "Score: 3"
        self.bodies, self.keys, self.under_way, self.most = [], [], 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        said = self.reply(body)
        with self.lock:
            self.under_way -= 1
        status, content = said if isinstance(said, tuple) else (200, said)
        turn = {"role": "assistant", "content": content}
        message = {"choices": [{"index": 0, "finish_reason": "stop", "message": turn}]}
        data = json.dumps(message if status == 200 else {"error": {"message": content}}).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client has lost its patience
            handler.wfile.write(data)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def judge(server):
    usual = {"model": "m", "endpoint": server.url, "retries": 0}
    return lambda **settings: open_judge(JudgeConfig(**{**usual, **settings}))


def score(judge, *completions):
    return asyncio.run(judge.score(["p"] * len(completions), completions))


def asked(body):
    return body["messages"][-1]["content"]


def test_scores_in_order_whatever_order_they_come_in(server, judge):
    def reply(body):
        number = int(asked(body).split("<answer>\n")[1].split("\n")[0])
        time.sleep(0.02 * (5 - number))
        return f"Score: {number}"

    server.reply = reply
    assert score(judge(concurrency=4), "1", "2", "3", "4", "5") == [1, 2, 3, 4, 5]
    assert 1 < server.most <= 4
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("m", 0.0, 512, 0)


def test_at_most_so_many_requests_at_the_same_time(server, judge):
    server.reply = lambda body: time.sleep(0.01) or "Score: 3"
    score(judge(concurrency=2), *"abcdefgh")
    assert server.most == 2


def test_a_reply_that_cannot_be_read_is_asked_again_with_a_reminder(server, judge):
    server.reply = lambda body: "Rather good." if len(body["messages"]) == 2 else "Score: 7"
    assert score(judge(), "x") == [7.0]
    again = server.bodies[1]["messages"]
    assert [m["role"] for m in again] == ["system", "user", "assistant", "user"]
    assert again[2]["content"] == "Rather good." and "a number from 1 to 10" in again[3]["content"]


def test_after_all_attempts_the_row_fails_and_no_number_is_made_up(server, judge):
    server.reply = lambda body: "Score: 4" if "<answer>\ngood" in body["messages"][1]["content"] else "Hm."
    good, bad = score(judge(attempts=2), "good", "bad")
    assert good == 4.0 and isinstance(bad, Failure)
    assert "in 2 attempts" in bad.what and "'Hm.'" in bad.what and len(server.bodies) == 3


def test_pairs_in_both_orders(server, judge):
    def longer(body):
        a, b = (asked(body).split(f"<answer_{x}>\n")[1].split("\n")[0] for x in "ab")
        return f"Verdict: {'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'tie'}"

    server.reply = longer
    verdicts = compare_both_orders(judge(), ["p"] * 3, ["xx", "x", "x"], ["y", "yy", "y"])
    assert [(v.winner, v.margin) for v in verdicts] == [("first", None), ("second", None), ("tie", None)]
    assert asyncio.run(judge().compare(["p"], ["a"], ["bb"])) == [Opinion("B")]


def test_a_busy_server_is_asked_again_with_back_off(server, judge):
    replies = iter([(503, "busy"), (429, "slow down"), "Score: 2"])
    server.reply = lambda body: next(replies)
    started = time.monotonic()
    assert score(judge(retries=2), "x") == [2.0]
    assert len(server.bodies) == 3 and time.monotonic() - started > 0.4


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_server_that_refuses_ends_it_with_what_to_do(server, judge, status):
    server.reply = lambda body: (status, "no such thing")
    with pytest.raises(RewardError, match=rf"(?s)judge m at http.*refuses with status {status}.*api_key_env"):
        score(judge(concurrency=1), *"abcdefgh")
    assert len(server.bodies) < 8, "the first refusal ends it"


def test_a_bad_request_fails_its_row_alone(server, judge):
    server.reply = lambda body: (400, "too long") if "<answer>\nlong" in asked(body) else "Score: 5"
    good, bad = score(judge(), "short", "long")
    assert good == 5.0 and "refused by the judge" in bad.what and "too long" in bad.what


def test_nobody_listens(server, judge):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(RewardError, match="did not answer in 1 attempts.*is the server up"):
        score(judge(), "x")


def test_a_server_that_hangs(server, judge):
    server.reply = lambda body: time.sleep(1) or "Score: 3"
    with pytest.raises(RewardError, match="did not answer.*raise judge.timeout_s"):
        score(judge(timeout_s=0.1), "x")


def test_the_key_comes_from_the_environment(server, judge, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    score(judge(api_key_env="MY_KEY"), "x")
    assert server.keys == ["Bearer secret-1"]
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="MY_KEY: this environment variable is not set"):
        judge(api_key_env="MY_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    score(judge(), "x")
    assert "another" not in server.keys[-1], "a key is sent only to whom the config names it for"


class Answers:
    """A server that gives one (status, headers, body), and counts how often it was asked."""

    def __init__(self, status, headers, body):
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.asked += 1
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def said(self, judge, where="", **settings):
        with pytest.raises(RewardError) as error:
            score(judge(endpoint=(where or self.url), **settings), "x")
        self.http.shutdown()
        self.http.server_close()
        return str(error.value)


def test_a_redirect_of_the_endpoint_is_not_followed(server, judge):
    moved = Answers(307, {"Location": f"{server.url}/chat/completions?k=s7"}, b"")
    assert f"redirects (status 307) to {server.url}/chat/completions?k=***; none is followed" in moved.said(judge)
    assert server.bodies == []


def test_an_endpoint_cannot_fill_the_memory(judge):
    kind = {"Content-Type": "application/json"}
    assert "more than 16777216 bytes" in Answers(200, kind, b" " * (2**24 + 1)).said(judge)
    packed = gzip.compress(b" " * 10**8)
    assert "compresses its answers" in Answers(200, {**kind, "Content-Encoding": "gzip"}, packed).said(judge)


def test_what_an_endpoint_says_is_printed_without_control_characters_and_secrets(judge, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk7")
    body = json.dumps({"error": {"message": "\x1b[2J no sk7 here, see http://h?token=q7"}}).encode()
    refused = Answers(403, {"Content-Type": "application/json"}, body)
    said = refused.said(judge, refused.url.replace("http://", "http://ada:pw7@"), api_key_env="MY_KEY")
    assert "\x1b" not in said and "sk7" not in said and "q7" not in said and "pw7" not in said
    assert "\\x1b[2J no *** here" in said and "http://***@127.0.0.1" in said
