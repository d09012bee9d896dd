"""Settings as a Python program gives them: a file, a mapping or a config object, with others over it by keyword."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from rlhf_ray.config.load import as_tree, forget_preset, parse_config, read_yaml, set_value, with_long_forms
from rlhf_ray.config.sections import Section, section_in
from rlhf_ray.config.shipped import PREFIX, shipped_config
from rlhf_ray.errors import ConfigError

Config = TypeVar("Config", bound=Section)
Source = str | Path | Mapping[str, Any] | Section | None


def config_of(source: Source, schema: type[Config], settings: Mapping[str, Any]) -> Config:
    """The config of `schema` that `source` describes, with `settings` over it.

    Args:
        source: a YAML file (also `shipped:<file>`), a mapping as in such a file, a config object, or nothing.
        settings: by the name of a setting (`steps=20`), of a section (`learner={"lr": 1e-5}` changes this one of its
            settings), or dotted (`{"learner.lr": 1e-5}`).

    Raises:
        ConfigError: everything that is wrong, as for a file.
    """
    tree, name = _tree_of(source, schema)
    tree = with_long_forms(tree)
    forget_preset(tree, _names(settings))
    problems = []
    for key, value in settings.items():
        try:
            _put(tree, key, value, schema)
        except ConfigError as error:
            problems.append(str(error))
    return parse_config(with_long_forms(tree), schema, name, problems)


def _tree_of(source: Source, schema: type[Section]) -> tuple[dict[str, Any], str]:
    """(settings by section, what errors call them)"""
    if source is None:
        return {}, "the settings"
    if isinstance(source, Section):
        if not isinstance(source, schema):
            raise ConfigError(
                f"the config is a {type(source).__name__}, and this needs a {schema.__name__}; call the function of "
                "its own command, or give a mapping of settings"
            )
        return as_tree(source), type(source).__name__
    if isinstance(source, Mapping):
        return as_tree(dict(source)), "the settings"
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"the config is a {type(source).__name__}; give the path of a YAML file, a mapping of settings, or a "
            f"{schema.__name__}"
        )
    text = str(source)
    path = shipped_config(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(source)
    return read_yaml(path), text


def _names(settings: Mapping[str, Any]) -> list[str]:
    """The dotted names of settings that stand alone or in a mapping."""
    found = list(settings)
    for key, value in settings.items():
        inner = as_tree(value)
        found += [f"{key}.{name}" for name in inner] if isinstance(inner, dict) else []
    return found


def _put(tree: dict[str, Any], key: str, value: Any, schema: type[BaseModel]) -> None:
    if "." in key:
        set_value(tree, key, as_tree(value), f"setting '{key}'")
        return
    field = schema.model_fields.get(key)
    section = None if field is None else section_in(field.annotation)
    inner = as_tree(value) if section is not None else value
    if section is None or not isinstance(inner, dict) or not isinstance(tree.get(key), dict):
        tree[key] = inner
        return
    tree[key] = dict(tree[key])
    for name, setting in inner.items():
        _put(tree[key], name, setting, section)
