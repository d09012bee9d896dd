"""Every config of configs/ runs for two steps in a fresh clone without any other folder, from anywhere.

As it stands but for its sizes; what names a Hub model, a Hub dataset or GPUs gets a local folder, this package's rows
and the CPU, and nothing else. What needs the model of another config finds it where the comments of that config put it,
so they run in the order of `CASES`, in one process: a process each would be minutes of imports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """`replaced`: the settings that a machine without GPUs and without the Hub cannot have."""

    small: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    run_dir: str | None = None  # where its own comment, or that of a config that uses its model, has it


RL = ("steps=2", "warm_start.steps=2", "eval.size=4", "rollout.prompts_per_step=2")
TRAIN = ("steps=2",)
EVAL = ("data.limit=4", "self_bleu_texts=8", "sampling.max_new_tokens=8")
# Pairs come from models that have learned nothing: any difference will do.
STAGES = {"sft": TRAIN, "rm": TRAIN, "dpo": TRAIN, "pairs": ("min_margin=0",), "eval": (*EVAL, "perplexity.limit=8"),
          "ppo": ("steps=2", "eval.size=4", "rollout.prompts_per_step=8"), "judge": TRAIN}  # fmt: skip


def pipeline(*stages: str) -> Case:
    """The stages' small settings; `rm1` is a stage like `rm`."""
    small = tuple(f"{stage}.{setting}" for stage in stages for setting in STAGES[stage.rstrip("12")])
    return Case(("values.prompts=40", "values.held_out=4", *small))


CASES = {
    "grpo_arithmetic": Case((*RL, "warm_start.batch_size=4")),
    "grpo_chinese": Case(RL, run_dir="runs/grpo-chinese"),
    "eval_chinese": Case(EVAL),
    "grpo_reviews": Case(RL, run_dir="runs/grpo-reviews"),
    "eval_reviews": Case((*EVAL, "perplexity.limit=8", "ratings.prompts=2")),
    "pairs_reviews": Case(("data.limit=8", "min_margin=0")),
    "classifier_reviews": Case(TRAIN, run_dir="runs/classifier-reviews"),
    "ppo_reviews": Case((*RL, "rollout.prompts_per_step=8")),
    "sft_reviews": Case(TRAIN),
    "sft_alpaca": Case(TRAIN),
    "sft_hh": Case(TRAIN, run_dir="runs/sft-hh"),
    "rm_hh": Case(TRAIN),
    "dpo_hh": Case(TRAIN),
    "grpo_gsm8k": Case((*RL, "rollout.max_new_tokens=8"), run_dir="runs/grpo-gsm8k"),
    "grpo_gsm8k_8gpu": Case(
        ("steps=2", "eval.size=4", "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_new_tokens=8"),
        ("model.path=runs/grpo-gsm8k/model", "data.path=shipped:problems.train.jsonl",
         "data.eval_path=shipped:problems.test.jsonl", "device=cpu", "executor=local", "generator.engine=hf",
         "generator.count=1", "learner.engine=torch", "learner.world_size=1", "learner.zero_stage=0"),
    ),
    "pipeline_reviews": pipeline("sft", "judge", "pairs", "rm", "ppo", "dpo", "eval"),
    "pipeline_online_rm": pipeline("sft", "pairs1", "rm1", "ppo1", "pairs2", "rm2", "ppo2", "eval"),
    "reward_server": Case(("port=0",)),
}  # fmt: skip

# Reads [[name, [argument, ...]], ...], runs each command, and writes {name: the error, or nothing}. The stages of a
# pipeline run in this process too, and the reward server, which would serve until Ctrl-C, answers two requests.
RUN_THEM = """
import json, sys, threading, traceback
from urllib.request import urlopen
from rlhf_ray import cli
from rlhf_ray.commands.pipeline import stages
from rlhf_ray.rewards.server import RewardServer

def run(arguments):
    cli.app(arguments, standalone_mode=False)
    return 0

serve = RewardServer.serve

def answer_twice(server):
    threading.Thread(target=serve, args=(server,), daemon=True).start()
    for _ in range(2):
        with urlopen(server.url + "/score", json.dumps({"completions": ["Lovely."]}).encode()) as answer:
            assert json.load(answer)["total"][0] > 0

if __name__ == "__main__":
    stages.run_command, RewardServer.serve = run, answer_twice
    results = {}
    for name, arguments in json.load(open(sys.argv[1])):
        try:
            run(arguments)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
    json.dump(results, open(sys.argv[2], "w"))
"""


def command_of(config: Path) -> str:
    """The command that the comment at the top of a config names for it."""
    return re.search(rf"rlhf-ray ([\w-]+) +configs/{config.name}", config.read_text(encoding="utf-8"))[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What `git clone` gives, with what is not committed yet."""
    folder = tmp_path_factory.mktemp("clone") / "rlhf_ray"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def results(clone: Path, tmp_path_factory) -> dict[str, str]:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    commands = []
    for name, case in CASES.items():
        config = clone / "configs" / f"{name}.yaml"
        command = command_of(config)
        run_dir = [] if command == "serve-reward" else ["--run-dir", case.run_dir or f"runs/{name}"]
        commands.append((name, [command, str(config), *case.replaced, *case.small, *run_dir]))
    (elsewhere / "commands.json").write_text(json.dumps(commands))
    (elsewhere / "run_them.py").write_text(RUN_THEM)
    environment = {**os.environ, "PYTHONPATH": str(clone), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "run_them.py", "commands.json", "results.json"],
        cwd=elsewhere, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((elsewhere / "results.json").read_text())


def test_every_config_has_a_case_and_no_folder_from_elsewhere():
    configs = {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}
    assert CASES.keys() == configs.keys(), "say in CASES how a new config runs for two steps"
    for name, path in configs.items():
        outside = re.search(r"(?<![\w.])\.\./\S*", path.read_text(encoding="utf-8"))
        assert not outside, f"{name}: a fresh clone has no {outside}"


@pytest.mark.parametrize("name", CASES)
def test_it_runs(results, name):
    assert not results[name], f"{name}: {results[name]}"
