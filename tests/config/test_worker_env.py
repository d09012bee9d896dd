"""`ray.env`: environment variables for workers, what is refused, and which are shown to nobody."""

from __future__ import annotations

import pytest

from rlhf_ray.config.load import dump_config, load_config
from rlhf_ray.config.worker_env import Variables
from rlhf_ray.errors import ConfigError


@pytest.fixture
def load(tiny_tree, tmp_path):
    import yaml

    def make(*overrides: str, env: object = None):
        tree = tiny_tree if env is None else tiny_tree | {"ray": {"env": env}}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(path, overrides)

    return make


def test_values_are_text_numbers_too_and_an_override_adds_one(load):
    config = load("ray.env.NCCL_DEBUG=INFO", env={"NCCL_IB_TIMEOUT": 22, "NCCL_IB_HCA": "mlx5", "HF_HOME": None})
    assert config.ray.env == {"NCCL_IB_TIMEOUT": "22", "NCCL_IB_HCA": "mlx5", "HF_HOME": None, "NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize(("env", "says"), [
    ({"MASTER_ADDR": "10.0.0.1"}, "the run itself sets MASTER_ADDR"),
    ({"RAY_AUTH_TOKEN": "x"}, "the run itself sets RAY_AUTH_TOKEN"),
    ({"MY-NAME": "x"}, "'MY-NAME' is no name of an environment variable"),
    ({"A": "x\0y"}, "a zero byte ends a value, and A holds one"),
    ({"A": True}, "ray.env.A"),
    ({"A": [1]}, "ray.env.A"),
    ("A=1", "ray.env"),
])  # fmt: skip
def test_what_cannot_be_an_environment_is_refused(load, env, says):
    with pytest.raises(ConfigError, match=says):
        load(env=env)


def test_a_refusal_quotes_no_secret(load):
    with pytest.raises(ConfigError) as error:
        load(env={"MY-NAME": "x", "HF_TOKEN": "t-123"})
    assert "t-123" not in str(error.value)


def test_secrets_and_the_commands_own_values_are_kept_from_what_ray_shows(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/models")
    variables = Variables.of({
        "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "k-123", "HF_HOME": None, "HTTPS_PROXY": "http://me:pw@proxy:3128",
    })  # fmt: skip
    assert variables.shown == {"NCCL_DEBUG": "INFO"}
    assert variables.quiet == {"WANDB_API_KEY": "k-123", "HF_HOME": "/models", "HTTPS_PROXY": "http://me:pw@proxy:3128"}
    assert "k-123" not in repr(variables) and "pw" not in repr(variables)


def test_an_empty_one_that_the_command_does_not_have_is_refused(monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    with pytest.raises(ConfigError, match="ray.env.HF_HOME is empty.*export it before the command"):
        Variables.of({"HF_HOME": None})


def test_config_yaml_hides_secrets_and_asks_for_them_again(load, tmp_path):
    config = load(env={"WANDB_API_KEY": "k-123", "HF_TOKEN": None, "NCCL_DEBUG": "INFO"})
    text = dump_config(config)
    assert "k-123" not in text and "WANDB_API_KEY: '***'" in text and "NCCL_DEBUG: INFO" in text
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="ray.env.WANDB_API_KEY"):
        load_config(tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml", ["ray.env.WANDB_API_KEY=k-123"])
    assert again.ray.env == config.ray.env
