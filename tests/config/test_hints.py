"""Names of other tools: each hint names a setting that is there, and is shown to whoever writes the foreign name."""

import re

import pytest
import yaml

from rlhf_ray.commands.hints import HINTS
from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.hints import FOREIGN, has_setting, hint_for
from rlhf_ray.config.load import load_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import SCHEMAS, DPOConfig, SFTConfig
from rlhf_ray.errors import ConfigError

EVERY = [RunConfig, EvalRunConfig, *SCHEMAS.values()]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_a_hint_names_is_a_setting_of_some_command(foreign):
    for name in FOREIGN[foreign]:
        assert name.startswith("--") or any(has_setting(schema, name.split(".")) for schema in EVERY), name


@pytest.mark.parametrize(("foreign", "schema", "expected"), [
    ("beta", RunConfig, "algorithm.kl_coef"),
    ("beta", DPOConfig, "dpo.beta"),
    ("use_vllm", RunConfig, "generator.engine"),
    ("use-vllm", RunConfig, "generator.engine"),
    ("learning_rate", SFTConfig, "learner.lr"),
    ("num_generations", RunConfig, "rollout.group_size"),
    ("num_generations", SFTConfig, None),
    ("lora_r", SFTConfig, "model.lora.r"),
    ("output_dir", SFTConfig, "--run-dir"),
    ("nonsense", RunConfig, None),
])  # fmt: skip
def test_the_setting_that_the_command_has_is_named(foreign, schema, expected):
    assert hint_for(foreign, schema) == expected


def test_whoever_writes_a_foreign_name_is_told_ours(tmp_path, tiny_tree):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**tiny_tree, "beta": 0.1}))
    with pytest.raises(ConfigError) as refused:
        load_config(path, ["learner.learning_rate=1", "rollout.num_generations=4", "learner.lrr=1"])
    text = str(refused.value)
    assert "  - beta: unknown key; here it is algorithm.kl_coef" in text
    assert "learner.learning_rate: unknown key; here it is learner.lr\n" in text
    assert "rollout.num_generations: unknown key; here it is rollout.group_size" in text
    assert "learner.lrr: unknown key; did you mean learner.lr?" in text


def test_a_hint_for_a_command_names_one_that_is_there():
    from rlhf_ray.cli import app

    there = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    for hint in HINTS.values():
        if hint.startswith("rlhf-ray ") and not hint.startswith("rlhf-ray --"):
            commands = re.split(r" [A-Z]+\b", hint.removeprefix("rlhf-ray "))[0]  # before CONFIG, FILE or MODEL
            assert set(commands.split(" | ")) <= there
