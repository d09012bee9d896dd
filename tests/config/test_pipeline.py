"""Stages feed each other by name; everything wrong is said before the first one runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config.pipeline import load_pipeline, resolve
from rlhf_ray.errors import ConfigError

SFT = "model: {path: scratch:qwen2, tokenizer: {path: scratch:char}}\ndata: {path: rows.jsonl, max_length: 64}\n"
RL = "model: {path: nowhere}\ndata: {path: 'task:arithmetic'}\nrewards: [{function: exact_answer}]\n"
STAGES = """
name: both
values: {model: small, weight: 2}
stages:
  - {name: sft, run: sft, config: sft.yaml}
  - {name: ppo, run: rl, config: rl.yaml, set: {model.path: "${sft.model}", rewards.0.weight: "${weight}"}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"sft": SFT, "rl": RL, "both": STAGES}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def stages_of(folder: Path, *overrides: str, text: str | None = None):
    if text is not None:
        (folder / "both.yaml").write_text(text)
    pipeline, of_stages = load_pipeline(folder / "both.yaml", overrides)
    return resolve(pipeline, folder, Path("/run"), of_stages)


def test_a_stage_reads_what_an_earlier_one_leaves(folder):
    sft, ppo = stages_of(folder)
    assert ppo.config.model.path == "/run/sft/model" and ppo.needs == ("sft",) and sft.needs == ()
    assert ppo.config.rewards[0].weight == 2.0  # a value: not the text "2"
    assert sft.config.name == "sft"
    sft, ppo = stages_of(folder, "values.weight=5")
    assert ppo.config.rewards[0].weight == 5.0


def test_overrides_go_to_one_stage_or_to_all(folder):
    sft, ppo = stages_of(folder, "seed=3", "ppo.learner.lr=0.5", "ppo.seed=4")
    assert (sft.config.seed, ppo.config.seed) == (3, 4) and ppo.config.learner.lr == 0.5


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("${sft.model}", "${sfd.model}", "did you mean sft?"),
        ("${sft.model}", "${ppo.model}", "names no stage before it"),
        ("${sft.model}", "${sft.data}", "leaves ${sft.model}, ${sft.dir}"),
        ("${sft.model}", "${modl}", "none of the pipeline's values; did you mean model?"),
        ("name: ppo", "name: sft", "two stages are called sft"),
        ("run: rl", "run: rlx", "stages.1.run"),
        ("rewards.0.weight", "rewards.7.weight", "not an index into a list of 1"),
        ("config: rl.yaml", "config: r.yaml", "does not exist; did you mean"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, old, new, says):
    with pytest.raises(ConfigError) as error:
        stages_of(folder, text=STAGES.replace(old, new))
    assert says in str(error.value)


def test_errors_of_all_stages_come_at_once(folder):
    with pytest.raises(ConfigError) as error:
        stages_of(folder, "sft.lerner.lr=1", "ppo.rollout.group_size=1")
    assert "did you mean learner?" in str(error.value) and "group_size" in str(error.value)


def test_every_pipeline_of_the_repository_resolves(repo_root):
    files = sorted((repo_root / "configs").glob("pipeline_*.yaml"))
    assert files
    for path in files:
        pipeline, _ = load_pipeline(path)
        assert len(resolve(pipeline, path.parent, Path("run"), {})) == len(pipeline.stages)
