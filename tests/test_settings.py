"""docs/settings.md has every setting of every command, with its default and its meaning."""

from __future__ import annotations

import re
from typing import Annotated

import pytest
import yaml
from pydantic import Field
from pydantic.fields import FieldInfo

from rlhf_ray.config.load import dump_config, load_config
from rlhf_ray.config.sections import section_in
from rlhf_ray.config.supervised import SCHEMAS


@pytest.fixture(scope="module")
def make_settings(script):
    return script("docs/make_settings.py")


def test_the_page_is_what_the_schema_says(repo_root, make_settings):
    written = (repo_root / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == make_settings.page(), "docs/settings.md is not what the schema says: `make settings` writes it"


def test_every_command_with_a_config_is_there(make_settings):
    from rlhf_ray.cli import app

    commands = {c.name or c.callback.__name__.replace("_", "-"): c.callback for c in app.registered_commands}
    assert {name for name, run in commands.items() if "config" in run.__annotations__} == set(make_settings.COMMANDS)


@pytest.mark.parametrize("setting", [
    "| `lr` | number, > 0 | `1e-06` |", "| `group_size` | integer, > 0 | `8` |", "| `kl_in` | `loss` \\| `reward` |",
    "| `models` | mapping of names to [SampledModelConfig](#sampledmodelconfig) | required |", "`models.<name>` (eval)",
    "| `stages` | list of [StageConfig](#stageconfig) | required |", "`rewards.0` (rl, eval, pairs, serve-reward)",
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


def meanings(page: str) -> dict[str, str]:
    """`Section.setting` -> the last cell of its line, for every line of every table of settings."""
    found, section, settings = {}, "", False
    for line in page.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
            settings = cells[-1] == "meaning" or (settings and len(cells) == 4)
            if settings and cells[0].startswith("`"):
                found[f"{section}.{cells[0].strip('`')}"] = cells[-1]
    return found


def test_every_setting_says_what_it_does(make_settings):
    said = meanings(make_settings.page())
    assert {"AlgorithmConfig.kl_in", "rlhf-ray rl.seed", "DatasetSourceConfig.split"} <= said.keys()
    assert [name for name, meaning in said.items() if not meaning] == [], "give these a description= in the schema"


def test_every_section_says_what_it_is(make_settings):
    sections = {*make_settings.COMMANDS.values(), *make_settings.sections()}
    assert [section.__name__ for section in sections if not make_settings._doc(section)] == []


def test_no_meaning_is_taken_for_a_tag(make_settings):
    """`<name>` is shown in code only: anywhere else a browser takes it for HTML and shows nothing."""
    outside_code = {name: "".join(meaning.split("`")[::2]) for name, meaning in meanings(make_settings.page()).items()}
    assert [name for name, text in outside_code.items() if re.search(r"<\w", text)] == []


@pytest.mark.parametrize(("bounds", "words"), [
    ({"ge": 0, "lt": 1 << 32}, "integer, 0 to 2^32 - 1"), ({"gt": 0, "le": 1 << 14}, "integer, 1 to 16384"),
    ({"ge": 1, "le": 1 << 24}, "integer, 1 to 2^24"), ({"gt": 0}, "integer, > 0"),
])  # fmt: skip
def test_bounds_of_whole_numbers(make_settings, bounds, words):
    assert make_settings.kind_of(FieldInfo.from_annotation(Annotated[int, Field(**bounds)])) == words


def default_at(config, dotted: str):
    """What a setting is in `config`; in a section that is not there, what it would be."""
    schema = type(config)
    for part in dotted.split("."):
        field = schema.model_fields[part]
        config = field.default if config is None else getattr(config, part)
        schema = section_in(field.annotation) or schema
    return config


def test_the_page_of_defaults_has_ours(repo_root, make_settings, tmp_path):
    tree = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    configs = {name: SCHEMAS[name](**tree) for name in SCHEMAS} | {
        name: load_config(tmp_path / "run.yaml", ["rewards=[{function: exact_answer}]", *ppo])
        for name, ppo in (("rl", []), ("ppo", ["algorithm.name=ppo"]))
    }
    heading, checked = "", []
    for line in (repo_root / "docs" / "defaults.md").read_text(encoding="utf-8").splitlines():
        heading = line if line.startswith("## ") else heading
        if line.startswith("| `"):
            settings, ours = (cell.strip() for cell in line.split("|")[1:3])
            command = re.search(r"\((\w+)\)", settings)
            config = configs[command[1] if command else "ppo" if heading == "## PPO" else "rl"]
            for dotted in re.findall(r"`([^`]+)`", settings):
                value = default_at(config, dotted)
                checked.append(dotted)
                assert ours == ("empty" if value is None else make_settings._shown(value)), (heading, dotted)
    assert len(checked) > 45 and "learner.epochs" in checked and "safety.weight" in checked
