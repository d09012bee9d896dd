"""What libraries print: silent where it means nothing to a user, and all there when it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.models import library_logs
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.remote.cluster import connected, worker_environment

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "VLLM_LOGGING_LEVEL": "ERROR"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in library_logs.SETTINGS:
        monkeypatch.delenv(name, raising=False)


def environment_after(monkeypatch, **given: str) -> dict[str, str]:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment = dict(given)
    library_logs.quiet(environment)
    return environment


def test_libraries_are_quiet_and_the_user_has_the_last_word(monkeypatch):
    assert environment_after(monkeypatch) == QUIET
    assert environment_after(monkeypatch, VLLM_LOGGING_LEVEL="INFO") == {**QUIET, "VLLM_LOGGING_LEVEL": "INFO"}
    assert environment_after(monkeypatch, RLHF_RAY_LIBRARY_LOGS="1") == {"RLHF_RAY_LIBRARY_LOGS": "1"}


def test_workers_are_as_quiet_as_the_run(monkeypatch):
    config = RunConfig(data={"path": "task:arithmetic"}, model={"path": "m"})
    assert QUIET.items() <= worker_environment(config.ray.cpus_per_worker, "cpu").items()
    monkeypatch.setenv("RLHF_RAY_LIBRARY_LOGS", "1")
    loud = worker_environment(config.ray.cpus_per_worker, "cpu")
    assert loud["RLHF_RAY_LIBRARY_LOGS"] == "1" and not QUIET.keys() & loud.keys()


def test_ray_shows_what_its_workers_print_when_it_is_asked_for(monkeypatch):
    asked = []

    def init(**settings):
        asked.append((settings["log_to_driver"], settings["logging_level"]))
        raise ConnectionError("enough")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # by another test of this process
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for value in ("", "1"):
        monkeypatch.setenv("RLHF_RAY_LIBRARY_LOGS", value)
        with pytest.raises(Exception, match="enough"), connected(None, 1):
            pass
    assert asked == [(False, "ERROR"), (True, "INFO")]


def test_every_command_sets_it_before_a_library_loads(repo_root):
    code = (
        "import sys; sys.argv = ['rlhf-ray', '--version']\n"
        "from rlhf_ray import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "import os; print('torch' in sys.modules, os.environ['TORCH_CPP_LOG_LEVEL'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo_root, env=os.environ)
    assert done.stdout.splitlines()[1:] == ["False ERROR"], done.stderr


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("source", ["made", "folder"])
def test_no_advice_about_long_texts(monkeypatch, tmp_path, caplog, source, wanted):
    if wanted:
        monkeypatch.setenv("RLHF_RAY_LIBRARY_LOGS", "1")
    tokenizer = build_tokenizer("char", ["ab"], max_length=4)
    if source == "folder":
        tokenizer.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer("abababab")["input_ids"]) == 8, "it is encoded whole"
    assert ("Token indices sequence length" in caplog.text) is wanted
