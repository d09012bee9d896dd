"""Optional packages: which settings need which, and that their absence is said before anything runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rlhf_ray.commands.doctor.checks import EXTRAS
from rlhf_ray.config import extras
from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.extras import needs_of, require
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.load import parse_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import SFTConfig
from rlhf_ray.errors import ConfigError

MODEL = {"model": {"path": "some/model"}, "data": {"path": "rows.jsonl"}}
TREES = {
    EvalRunConfig: {"models": {"a": "x", "b": "y"}, "data": {"path": "rows.jsonl"}},
    PairsConfig: {"model": "x", "data": {"path": "rows.jsonl"}, "rewards": [{"function": "sentiment"}]},
    RunConfig: {**MODEL, "rewards": [{"function": "exact_answer"}]},
    SFTConfig: MODEL,
}
ENDPOINT = {"model": "j", "endpoint": "http://host:8000/v1"}
LORA = {"path": "some/model", "lora": {"r": 4}}


def requirements_of(extra: str) -> list[str]:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{extra} = (\[.*\])$", text, re.MULTILINE)[1])


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda module: None)


@pytest.mark.parametrize(
    ("schema", "changes", "modules"),
    [
        (EvalRunConfig, {}, "sacrebleu"),  # nothing says who wins
        (EvalRunConfig, {"rewards": [{"function": "math"}]}, "math_verify sacrebleu scipy"),
        (EvalRunConfig, {"rewards": [{"function": "math"}], "models": {"a": "x"}}, "math_verify sacrebleu"),
        (EvalRunConfig, {"chinese": "words"}, "rjieba sacrebleu"),
        (RunConfig, {"rewards": [{"function": "keyword", "args": {"keywords": ["好"], "chinese": "words"}}]}, "rjieba"),
        (RunConfig, {"rewards": [{"function": "keyword", "args": {"keywords": ["好"]}}]}, ""),
        (EvalRunConfig, {"judge": ENDPOINT}, "openai sacrebleu scipy"),
        (EvalRunConfig, {"judge": {"model": "a local folder"}}, "sacrebleu scipy"),
        (EvalRunConfig, {"red_team": {"path": "r", "safety": {"function": "rouge"}}}, "rouge_score sacrebleu"),
        (PairsConfig, {}, ""),
        (PairsConfig, {"judge": ENDPOINT}, "openai"),
        (RunConfig, {}, ""),
        (RunConfig, {"rewards": [{"function": "judge", "args": ENDPOINT}]}, "openai"),
        (RunConfig, {"rewards": [{"function": "judge", "args": {"model": "j"}}]}, ""),
        (RunConfig, {"rewards": [{"function": "rouge"}], "executor": "ray"}, "ray"),
        (RunConfig, {"generator": {"engine": "vllm"}, "learner": {"engine": "deepspeed"}}, "deepspeed vllm"),
        (RunConfig, {"logging": {"loggers": ["tensorboard", "wandb", "mlflow", "trackio"]}}, "mlflow trackio wandb"),
        (PairsConfig, {"generator": {"engine": "vllm"}}, "vllm"),
        (SFTConfig, {}, ""),
        (SFTConfig, {"model": LORA}, "peft"),
        (SFTConfig, {"model": {**LORA, "lora": {"quantize": "nf4"}}}, "bitsandbytes peft"),
        (SFTConfig, {"model": LORA, "executor": "ray"}, "ray"),
    ],
)
def test_what_the_settings_need(schema, changes, modules):
    config = parse_config({**TREES[schema], **changes}, schema, source="the test")
    needs = needs_of(config)
    assert sorted(need.module for need in needs) == modules.split()
    for need in needs:
        requirements = " ".join(requirements_of(need.extra))
        assert need.module.replace("_", "-") in requirements, f"{need.extra} does not bring {need.module}"


def test_the_refusal_names_every_package_and_what_to_install(nothing_installed):
    rewards = [{"function": "rouge"}, {"function": "sentiment"}]
    config = parse_config({**TREES[EvalRunConfig], "rewards": rewards}, EvalRunConfig, source="the test")
    with pytest.raises(ConfigError) as error:
        require(needs_of(config))
    assert str(error.value) == (
        "not installed: rouge_score (for the reward rouge), sacrebleu (for self-BLEU), scipy (for win rates); "
        "these are optional packages: pip install 'rlhf-ray[rewards,eval]'"
    )
    require([])


def test_the_extras_are_those_of_pyproject():
    for extra, (_, packages) in EXTRAS.items():
        assert {re.split(r"[<>=]", requirement)[0] for requirement in requirements_of(extra)} == set(packages), extra
