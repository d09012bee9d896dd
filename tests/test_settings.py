"""docs/settings.md has every setting of every command, with its default and its meaning."""

from __future__ import annotations

import importlib.util

import pytest
import yaml

from rlhf_ray.config.load import dump_config, load_config


@pytest.fixture(scope="module")
def make_settings(repo_root):
    spec = importlib.util.spec_from_file_location("make_settings", repo_root / "docs" / "make_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_schema_says(repo_root, make_settings):
    written = (repo_root / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == make_settings.page(), "docs/settings.md is not what the schema says: `make settings` writes it"


def test_every_command_with_a_config_is_there(make_settings):
    from rlhf_ray.cli import app

    commands = {c.name or c.callback.__name__.replace("_", "-"): c.callback for c in app.registered_commands}
    assert {name for name, run in commands.items() if "config" in run.__annotations__} == set(make_settings.COMMANDS)


@pytest.mark.parametrize("setting", [
    "| `lr` | number, > 0 | `1e-06` |", "| `group_size` | integer, > 0 | `8` |", "| `kl_in` | `loss` \\| `reward` |",
    "| `betas` | [number, number] | `[0.9, 0.95]` |", "| `lora` | [LoraConfig](#loraconfig) | empty |",
])  # fmt: skip
def test_types_and_defaults(make_settings, setting):
    assert setting in make_settings.page()


def test_the_preset_that_is_shown_is_what_a_config_gets(make_settings, tmp_path):
    tree = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "rewards": [{"function": "exact_answer"}]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    resolved = dump_config(load_config(tmp_path / "run.yaml", ["algorithm.name=gspo"]))
    (line,) = [line for line in make_settings.presets() if line.startswith("| `gspo` |")]
    assert "`clip_low: 0.0003`" in line and "clip_low: 0.0003\n" in resolved
