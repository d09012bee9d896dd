"""YAML and dotted overrides into a RunConfig; all errors at once."""

from __future__ import annotations

import difflib
import itertools
import re
import reprlib
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_ray.config import dialect
from rlhf_ray.config.algorithm import AlgorithmConfig, passes_of
from rlhf_ray.config.checks import contradictions
from rlhf_ray.config.hints import hint_for, hints_in
from rlhf_ray.config.redacted import hidden_in, redacted, redacted_settings
from rlhf_ray.config.schema import RolloutConfig, RunConfig
from rlhf_ray.config.sections import Section, section_in
from rlhf_ray.config.sources import long_form
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.config.user_paths import is_file, is_folder
from rlhf_ray.errors import ConfigError

Config = TypeVar("Config", bound=Section)
Run = TypeVar("Run", bound=RunConfig | SupervisedConfig)

_OF_SOURCES = ("data", "sft_data")  # sections that may be lists of sources
_LONGEST = 2000  # characters of one problem


class _Shown(reprlib.Repr):
    """Only what is shown is looked at: behind aliases, a value in YAML may be larger than any memory."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        shown = itertools.islice(x.items(), self.maxdict + 1)
        known = {key: redacted_settings({key: value})[key] if isinstance(value, str) else value for key, value in shown}
        return super().repr_dict(known, level)

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redacted_settings(x), level)


_SHOWN = _Shown()  # of a wrong value: a section in its place may hold thousands
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 200, 200


def load_config(
    path: str | Path, overrides: Sequence[str] = (), schema: type[Config] = RunConfig
) -> Config:
    """Read `path`, apply `a.b=value` overrides (values are YAML), validate.

    Raises:
        ConfigError: listing every unknown key (with the nearest valid one), wrong value and contradiction.
    """
    return config_of(read_yaml(Path(path)), overrides, schema, source=str(path))


def config_of(tree: dict[str, Any], overrides: Sequence[str], schema: type[Config], source: str) -> Config:
    """The same of settings that lie in no file; `source` begins the error. The tree is not kept as it was."""
    tree = with_long_forms(tree)
    forget_preset(tree, [text.partition("=")[0] for text in overrides])
    problems = []
    for override in overrides:
        try:
            apply_override(tree, override)
        except ConfigError as error:
            problems.append(str(error))
    return parse_config(tree, schema, source=source, problems=problems)


def read_yaml(path: Path) -> dict[str, Any]:
    if not is_file(path):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        what = "is a folder; name a YAML file in it" if is_folder(path) else f"does not exist{hint}"
        raise ConfigError(f"config file {path} {what}")
    try:
        tree = dialect.read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_shortened(str(error))}") from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read ({error.strerror}); check its permissions") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, found {type(tree).__name__}")
    return tree


def with_long_forms(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with lists of sources as sections, so that `data.sources.0.path` has a place in each of its forms."""
    return {**tree, **{name: long_form(tree[name]) for name in _OF_SOURCES if name in tree}}


def forget_preset(tree: dict[str, Any], overridden: Sequence[str]) -> None:
    """Make room for the preset of an algorithm.name that is given as an override, among dotted names.

    A resolved config (`--dry-run`, a run's config.yaml) holds all that its own preset filled in, and would leave
    nothing for the new one to fill. What the old name gives anyway is dropped; what differs from it was set by hand.
    """
    section = tree.get("algorithm")
    if not isinstance(section, dict) or "algorithm.name" not in overridden:
        return
    name = section.get("name", "grpo")
    try:
        given = AlgorithmConfig(name=name).model_dump(mode="json")
        prompts = RolloutConfig(**tree.get("rollout", {})).prompts_per_step
    except (ValidationError, TypeError):
        return  # a name that is none; if the override mends it, the rest of the section was set by hand
    tree["algorithm"] = {"name": name, **_without(section, given)}
    for trained in ("learner", "critic"):
        if isinstance(tree.get(trained), dict):
            tree[trained] = _without(tree[trained], passes_of(name, prompts))


def _without(section: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What of a section is not as given."""
    return {key: value for key, value in section.items() if key not in given or value != given[key]}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `learner.lr=1e-6` in the tree. A list item is reached by its index: `rewards.0.weight=2`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override '{override}' is not of the form section.key=value")
    set_value(tree, dotted, _parse_value(text, override), f"override '{override}'")


def set_value(tree: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Set one setting by its dotted name. `source` begins the error if there is no such place."""
    node: Any = tree
    keys = dotted.split(".")
    for key in keys[:-1]:
        node = _child(node, key, source)
    if isinstance(node, list):
        _child(node, keys[-1], source)
        node[int(keys[-1])] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value
    else:
        raise ConfigError(f"{source}: {'.'.join(keys[:-1])} is a value, not a section")
    if keys[0] in _OF_SOURCES:
        tree[keys[0]] = long_form(tree[keys[0]])


def _parse_value(text: str, override: str) -> Any:
    try:
        return dialect.read(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"override '{_shortened(override)}': the value is not valid YAML: {_shortened(str(error))}"
        ) from error


def _child(node: Any, key: str, source: str) -> Any:
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise ConfigError(f"{source}: '{key}' is not an index into a list of {len(node)}")
        return node[int(key)]
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    raise ConfigError(f"{source}: '{key}' lies below a value, not a section")


def parse_config(
    tree: dict[str, Any], schema: type[Config], source: str, problems: Sequence[str] = ()
) -> Config:
    """Validate a tree; raise one ConfigError that lists everything wrong with it, after the given `problems`."""
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        found = [*problems, *(_describe(item, schema) for item in error.errors())]
        found += _contradictions_of_the_rest(tree, schema, error, found)
        raise ConfigError(_listing(source, found)) from None
    found = [*problems, *_contradictions(config)]
    if found:
        raise ConfigError(_listing(source, found))
    return config


def on_device(config: Run, device: str) -> Run:
    """`config` on the device that `device: auto` has become: `generator.engine: auto` follows it.

    Raises:
        ConfigError: listing every contradiction, for the config alone could not know whether it fits the device.
    """
    here = f"device={config.device}, which is {device} here"
    if isinstance(config, RunConfig) and config.generator.engine == "auto":
        config = _with_generator_for(config, device)
        here += f", and generator.engine=auto, which is {config.generator.engine}"
    problems = contradictions(config, device) if isinstance(config, RunConfig) else config.contradictions(device)
    if problems:
        raise ConfigError(_listing(here, problems))
    return config


def _with_generator_for(config: RunConfig, device: str) -> RunConfig:
    """vLLM on CUDA, where it is installed and no setting speaks against it; Transformers runs everywhere.

    A GPU that is shared, by one process or by ray.gpus_per_worker, is left to Transformers: vLLM would hold most of
    it while the learner needs it. (With ray.colocate it sleeps meanwhile.)
    """
    hf, vllm = (
        config.model_copy(update={"generator": config.generator.model_copy(update={"engine": engine})})
        for engine in ("hf", "vllm")
    )
    shared = config.executor == "local" or (config.ray.gpus_per_worker < 1 and not config.ray.colocate)
    if shared or device != "cuda":
        return hf
    if find_spec("vllm") is None:
        warnings.warn(
            "generator.engine=auto is hf, for vLLM is not installed where this run was started; "
            "pip install 'rlhf-ray[vllm]', or set generator.engine=vllm if only the workers have it",
            stacklevel=3,
        )
        return hf
    against = set(contradictions(vllm, device)) - set(contradictions(hf, device))
    return hf if against else vllm


def validated(config: Config) -> Config:
    """A config that was made in Python, as if its settings had come from a file.

    `RunConfig(...)` does not look for contradictions, and `model_copy(update=...)` looks at nothing.
    Raises ConfigError as `load_config` does.
    """
    return parse_config(as_tree(config), type(config), source=type(config).__name__)


def as_tree(value: Any) -> Any:
    """What was set in a section or a mapping of settings, as a file would say it; the values are the same objects."""
    if isinstance(value, BaseModel):
        return {name: as_tree(inner) for name, inner in vars(value).items() if name in value.model_fields_set}
    if isinstance(value, dict):
        return {key: as_tree(inner) for key, inner in value.items()}
    if isinstance(value, list) and any(isinstance(inner, BaseModel) for inner in value):
        return [as_tree(inner) for inner in value]
    return value  # rows, too: there may be millions


def _contradictions(config: Section) -> list[str]:
    found = contradictions(config) if isinstance(config, RunConfig) else config.contradictions()
    hidden = [
        f"{name}: a secret was hidden here when this file was written; set it again, or better keep it in an "
        "environment variable (token_env of a reward server, api_key_env of a judge)"
        for name in hidden_in(config.model_dump(mode="json"))
    ]
    return found + hidden


def _contradictions_of_the_rest(
    tree: dict[str, Any], schema: type[BaseModel], error: ValidationError, found: Sequence[str]
) -> list[str]:
    """Contradictions among the settings that are valid, so that nobody has to mend a file twice.

    Those that name a setting which is wrong itself are left out: they would speak of its default.
    """
    rest = _copied(tree, {})
    for item in error.errors():
        _remove(rest, item["loc"])
    try:
        config = schema.model_validate(rest)
    except ValidationError:
        return []  # something is missing altogether
    wrong = [".".join(map(str, item["loc"])) for item in error.errors()]
    wrong += re.findall(r"did you mean ([\w.]+)\?", "\n".join(found))
    names = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}(?!\w)" for name in wrong))
    return [text for text in _contradictions(config) if not names.search(text)]


def _copied(tree: Any, copies: dict[int, Any]) -> Any:
    """Mappings and lists anew, one that stands in several places once; what they hold may be a model, and stays."""
    if id(tree) in copies or not isinstance(tree, dict | list):
        return copies.get(id(tree), tree)
    if isinstance(tree, dict):
        found = copies[id(tree)] = {}
        found.update((key, _copied(value, copies)) for key, value in tree.items())
    else:
        found = copies[id(tree)] = []
        found.extend(_copied(value, copies) for value in tree)
    return found


def _remove(tree: Any, loc: Sequence[Any]) -> None:
    """Delete what a validation error points to; its last parts may be pydantic's names of a union's members."""
    if not loc:
        return  # the whole tree, such as one with a key that is no text
    node = tree
    for part, following in zip(loc, [*loc[1:], None], strict=True):
        if isinstance(node, list) and not (isinstance(part, int) and part < len(node)):
            return  # an item that is missing
        inner = node.get(part) if isinstance(node, dict) else node[part]
        is_item = isinstance(inner, list) and isinstance(following, int)
        if not (is_item or (isinstance(inner, dict) and following in inner)):
            if isinstance(node, dict):
                node.pop(part, None)
            return
        node = inner


def _listing(source: str, problems: Sequence[str]) -> str:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return f"{source}: {count}\n" + "\n".join(f"  - {_shortened(redacted(problem))}" for problem in problems)


def _shortened(text: str) -> str:
    """A message holds what people wrote, and that may be a book."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 4 :]}"


def _describe(item: Any, schema: type[BaseModel]) -> str:
    dotted = ".".join(str(part) for part in item["loc"]) or "the settings"
    if item["type"] == "extra_forbidden":
        if item["loc"][-1] == "sources":
            return f"{dotted}: the rows are of one source here; set {dotted.removesuffix('sources')}path, once for each"
        valid = _valid_keys(schema, item["loc"][:-1])
        is_typo = bool(difflib.get_close_matches(str(item["loc"][-1]), valid, n=1, cutoff=0.8))
        if isinstance(item["input"], dict) and not is_typo:
            if (known := hints_in(dotted, item["input"], schema)) is not None:
                return f"{dotted}: unknown key; {known}"
        elif (known := hint_for(dotted, schema)) is not None:
            return f"{dotted}: unknown key; here it is {known}"
        near = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1, cutoff=0.5)
        prefix = dotted.rpartition(".")[0]
        hint = f"did you mean {prefix + '.' if prefix else ''}{near[0]}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{dotted}: unknown key; {hint}"
    if item["type"] == "invalid_key":
        return f"{dotted}: a key must be text (got {_shown(item)})"
    if item["type"] == "missing":
        return f"{dotted}: required and not set"
    if item["input"] is None:
        return f"{dotted}: is empty; give it a value, or remove the line"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{dotted}: {message} (got {_shown(item)})"


def _shown(item: Any) -> str:
    """The wrong value, without what is secret by its name or the names in it."""
    name, value = str(item["loc"][-1]) if item["loc"] else "", item["input"]
    return _SHOWN.repr(redacted_settings({name: value})[name] if isinstance(value, str) else value)


def _valid_keys(schema: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Field names of the section that `loc` points to; lists and optionals are looked through."""
    section: type[BaseModel] = schema
    for part in loc:
        if isinstance(part, int) or part not in section.model_fields:
            continue
        section = section_in(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML; reading it back gives an equal config, or is refused where a secret is hidden."""
    return dialect.write(redacted_settings(config.model_dump(mode="json")))
