"""A pipeline: stages in order, each one a command with its config, fed by the stages before it.

    stages:
      - {name: sft, run: sft, config: sft_reviews.yaml}
      - {name: ppo, run: rl, config: ppo_reviews.yaml, set: {model.path: "${sft.model}"}}

`${sft.model}` stands for the folder that the stage `sft` leaves its model in; `${reviews}` for a value of `values`.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.load import apply_override, parse_config, read_yaml, set_value, with_long_forms
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import Device, Dtype, RunDate, RunName, Section
from rlhf_ray.config.supervised import SCHEMAS
from rlhf_ray.errors import ConfigError

# Each command's config, and what it leaves behind by name: files and folders inside its run directory.
COMMANDS: dict[str, type[BaseModel]] = {**SCHEMAS, "rl": RunConfig, "pairs": PairsConfig, "eval": EvalRunConfig}
OUTPUTS: dict[str, dict[str, str]] = {
    **{command: {"model": "model", "dir": "."} for command in (*SCHEMAS, "rl")},
    "pairs": {"data": "pairs.jsonl", "dir": "."},
    "eval": {"report": "eval.json", "dir": "."},
}
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_OF_STAGES = "of every stage; empty: as its own config says"
_SHARED = ("seed", "executor", "device", "dtype", "clock")


class StageConfig(Section):
    """One command. Its settings are those of `config`, then those of `set` on top."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = Field(
        description="of its folder, and of what it leaves for others: `${sft.model}`"
    )
    run: Literal["sft", "rm", "dpo", "classifier", "rl", "pairs", "eval"] = Field(description="the command")
    config: str | None = Field(None, description="a YAML file, relative to the pipeline's own; or everything in `set`")
    set: dict[str, Any] = Field({}, description="dotted settings, as on the command line: `learner.lr: 1e-5`")


class PipelineConfig(Section):
    """Commands in order, fed by each other.

    `seed`, `executor`, `device`, `dtype` and `clock`, where given, hold for every stage that has such a setting.
    """

    name: RunName = "pipeline"
    seed: int | None = Field(None, ge=0, lt=1 << 32, description=_OF_STAGES)
    executor: Literal["local", "ray"] | None = Field(None, description=_OF_STAGES)
    device: Device | None = Field(None, description=_OF_STAGES)
    dtype: Dtype | None = Field(None, description=_OF_STAGES)
    clock: RunDate = None
    values: dict[str, str | int | float] = Field({}, description="`${name}` in a stage's settings stands for its value")
    stages: list[StageConfig] = Field(min_length=1)


@dataclass(frozen=True)
class Stage:
    """A stage with everything resolved: what is run, on what, and which stages it waits for."""

    name: str
    command: str
    config: BaseModel
    needs: tuple[str, ...]
    folder: Path

    def output(self, name: str) -> Path:
        return self.folder / OUTPUTS[self.command][name]


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> tuple[PipelineConfig, dict[str, Any]]:
    """(the pipeline, the overrides by stage). `sft.learner.lr=1e-4` changes the stage `sft`; `seed=1` all of them.

    Raises:
        ConfigError: listing what is wrong with the pipeline itself; `resolve` looks into the stages.
    """
    path, tree, problems = Path(path), read_yaml(Path(path)), []
    stages = tree.get("stages")
    names = {str(stage.get("name")) for stage in stages if isinstance(stage, dict)} if isinstance(stages, list) else ()
    of_stages: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        stage, dot, rest = override.partition(".")
        try:
            if dot and stage in of_stages:
                of_stages[stage].append(rest)
            else:
                apply_override(tree, override)
        except ConfigError as error:
            problems.append(str(error))
    pipeline = parse_config(tree, PipelineConfig, source=str(path), problems=problems)
    twice = sorted({s.name for s in pipeline.stages if [t.name for t in pipeline.stages].count(s.name) > 1})
    if twice:
        raise ConfigError(f"{path}: two stages are called {', '.join(twice)}; results are found by name, so rename one")
    return pipeline, of_stages


def resolve(
    pipeline: PipelineConfig, root: Path, run_dir: Path, overrides: Mapping[str, Sequence[str]]
) -> list[Stage]:
    """Every stage with its settings checked and its references turned into paths below `run_dir`.

    `root` is the folder that the stages' config files are relative to.

    Raises:
        ConfigError: listing everything wrong in all stages, before the first of them has cost an hour.
    """
    stages: dict[str, Stage] = {}
    problems: list[str] = []
    for given in pipeline.stages:
        source = f"stage {given.name}" + (f" ({given.config})" if given.config else "")
        try:
            tree = _settings(given, pipeline, root, overrides.get(given.name, ()))
            needs: dict[str, None] = {}
            tree = _filled(tree, pipeline.values, stages, needs, where=source)
            config = parse_config(tree, COMMANDS[given.run], source=source)
        except ConfigError as error:
            problems.append(str(error))
            config, needs = None, {}  # its outputs have names all the same: look at the stages that use them, too
        stages[given.name] = Stage(given.name, given.run, config, tuple(needs), run_dir / given.name)
    if problems:
        raise ConfigError("\n".join(problems))
    return list(stages.values())


def _settings(
    given: StageConfig, pipeline: PipelineConfig, root: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    tree = with_long_forms(read_yaml(root / given.config)) if given.config else {}
    tree.setdefault("name", given.name)
    for name in _SHARED:
        value = getattr(pipeline, name)
        if value is not None and name in COMMANDS[given.run].model_fields:
            tree[name] = value
    for dotted, value in given.set.items():
        set_value(tree, dotted, copy.deepcopy(value), f"{given.name}.set: {dotted}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def _filled(
    node: Any, values: Mapping[str, Any], stages: Mapping[str, Stage], needs: dict[str, None], where: str
) -> Any:
    """The same tree with `${value}` and `${stage.output}` replaced; the stages it names go into `needs`."""
    if isinstance(node, dict):
        return {key: _filled(value, values, stages, needs, where) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, values, stages, needs, where) for value in node]
    if not isinstance(node, str):
        return node

    def replacement(match: re.Match[str]) -> str:
        stage, dot, output = match.group(1).partition(".")
        if not dot:
            if stage not in values:
                near = _nearest(stage, values)
                raise ConfigError(f"{where}: {match.group(0)} is none of the pipeline's values; {near}")
            return str(values[stage])
        if stage not in stages:
            raise ConfigError(f"{where}: {match.group(0)} names no stage before it; {_nearest(stage, stages)}")
        outputs = OUTPUTS[stages[stage].command]
        if output not in outputs:
            raise ConfigError(
                f"{where}: {match.group(0)}: `{stages[stage].command}` leaves no {output!r}; "
                f"it leaves {', '.join(f'${{{stage}.{name}}}' for name in outputs)}"
            )
        needs[stage] = None
        return str(stages[stage].output(output))

    whole = _REFERENCE.fullmatch(node)
    if whole and whole.group(1) in values:
        return values[whole.group(1)]  # a number stays one
    return _REFERENCE.sub(replacement, node)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are {', '.join(known)}" if known else "there are none"
