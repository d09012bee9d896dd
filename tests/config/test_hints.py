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
    ("num_train_epochs", RunConfig, "steps"),
    ("kl_coef", RunConfig, "algorithm.kl_coef"),  # ours, at another place
    ("lr", SFTConfig, "learner.lr"),
    ("actor.lr", RunConfig, "warm_start.lr or learner.lr or critic.lr"),
    ("path", RunConfig, None),  # of too many sections to be a hint
    ("actor_rollout_ref.rollout.n", RunConfig, "rollout.group_size"),
    ("actor_rollout_ref.rollout.temperature", RunConfig, "rollout.temperature"),
    ("actor_rollout_ref.model.path", RunConfig, "model.path"),
    ("actor_rollout_ref.actor.optim.lr", RunConfig, "learner.lr"),
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


@pytest.mark.parametrize(("override", "told"), [
    ("reward.function=math", "reward.function: unknown key; here it is rewards"),
    ("reward.path=x", "reward.path: unknown key; here it is reward_model.path"),
    ("reward=math", "reward: says how many workers judge; the functions that they call are listed in `rewards`"),
    ("reward=[{function: math}]", "reward: says how many workers judge; the functions"),
])  # fmt: skip
def test_whoever_takes_the_workers_that_judge_for_what_judges_is_told_better(tmp_path, tiny_tree, override, told):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    with pytest.raises(ConfigError) as refused:
        load_config(path, [override])
    assert f"  - {told}" in str(refused.value)


def test_a_hint_for_a_command_names_one_that_is_there():
    from rlhf_ray.cli import app

    there = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    for hint in HINTS.values():
        if hint.startswith("rlhf-ray ") and not hint.startswith("rlhf-ray --"):
            commands = re.split(r" [A-Z]+\b", hint.removeprefix("rlhf-ray "))[0]  # before CONFIG, FILE or MODEL
            assert set(commands.split(" | ")) <= there


def test_a_section_of_another_tool_is_told_setting_by_setting(tmp_path, tiny_tree):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    verl = ["actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.kl_loss_coef=0.1", "trainer.total_epochs=2"]
    with pytest.raises(ConfigError) as refused:
        load_config(path, [*verl, "algorithm.kl_ctrl.kl_coef=0.1", "lerner.lr=1", "trainers.lrr=1"])
    text = str(refused.value)
    assert (
        "actor_rollout_ref: unknown key; here actor_rollout_ref.rollout.n is rollout.group_size; "
        "actor_rollout_ref.actor.kl_loss_coef is algorithm.kl_coef\n"
    ) in text
    assert "trainer: unknown key; here trainer.total_epochs is steps" in text
    assert "algorithm.kl_ctrl: unknown key; here algorithm.kl_ctrl.kl_coef is algorithm.kl_coef" in text
    assert "lerner: unknown key; did you mean learner?" in text
    assert "trainers: unknown key; did you mean" in text  # nothing in it is known


@pytest.mark.parametrize(("args", "message"), [
    (["rl", "x.yaml", "--learning_rate", "1e-5"], "a setting stands without dashes: learner.lr=1e-5"),
    (["rl", "x.yaml", "--num-generations=4"], "a setting stands without dashes: rollout.group_size=4"),
    (["dpo", "x.yaml", "--beta", "--dry-run"], "a setting stands without dashes: dpo.beta=VALUE"),
    (["sft", "x.yaml", "--learner.lr", "1"], "a setting stands without dashes: learner.lr=1"),
    (["sft", "x.yaml", "--output_dir", "here"], "what does it is --run-dir"),
    (["rl", "--config", "x.yaml"], "the file comes first: rlhf-ray rl FILE"),
    (["rl", "x.yaml", "--nonsense"], "No such option"),
])  # fmt: skip
def test_a_setting_that_is_given_as_an_option(args, message):
    from typer.testing import CliRunner

    from rlhf_ray.cli import app

    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
