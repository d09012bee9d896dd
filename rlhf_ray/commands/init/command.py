"""`rlhf-ray init`: a config for one's own data, and a reward to begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rlhf_ray.errors import ConfigError, RlhfRayError

if TYPE_CHECKING:
    from rlhf_ray.commands.init.look import Look
    from rlhf_ray.commands.init.wishes import Wishes

T = TypeVar("T")


class Kind(str, Enum):
    sft = "sft"
    rm = "rm"
    dpo = "dpo"
    rl = "rl"


class Where(str, Enum):
    local = "local"
    ray = "ray"


def init(
    command: Annotated[Kind | None, typer.Option(help="what it is for; without it, questions are asked")] = None,
    data: Annotated[str | None, typer.Option(help="a file, a folder or a Hub name; empty: example rows")] = None,
    column: Annotated[list[str] | None, typer.Option(help="a column with a name of its own: prompt=question")] = None,
    model: Annotated[str | None, typer.Option(help="scratch:qwen2|gpt2|lstm, a folder or a Hub name")] = None,
    reward: Annotated[
        str | None, typer.Option(help="rl: a built-in name, file.py:function (written where it is not there), or a URL")
    ] = None,
    reward_model: Annotated[str | None, typer.Option(help="rl: a reward model's folder or Hub name")] = None,
    where: Annotated[Where | None, typer.Option(help="this machine, or Ray")] = None,
    out: Annotated[Path | None, typer.Option(help="the config to write; default <command>.yaml")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace files that are there")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="ask nothing: defaults for what is not given")] = False,
) -> None:
    """Write a commented config for your own data and reward, which runs at once."""
    from rlhf_ray.data.validate import columns_from

    given = {
        "command": command and command.value, "data": data, "names": columns_from(column or []), "model": model,
        "reward": reward, "reward_model": reward_model, "where": where and where.value, "out": out,
    }  # fmt: skip
    asks = command is None and not yes
    try:
        wishes, examples = _wishes(given, _ask if asks else _take_default)
    except (EOFError, typer.Abort):
        raise typer.BadParameter("there is nobody to answer; give --command and the other options, or --yes") from None
    _write(wishes, examples, force)


Asker = Callable[[str, Mapping[str, str], str, Callable[[str], T]], T]


def _take_default(question: str, options: Mapping[str, str], default: str, check: Callable[[str], T]) -> T:
    return check(default)


def _ask(question: str, options: Mapping[str, str], default: str, check: Callable[[str], T]) -> T:
    """Asks until the answer passes `check`. An option may be named by its number."""
    typer.echo(f"\n{question}")
    for number, (name, meaning) in enumerate(options.items(), start=1):
        typer.echo(f"  {number}  {name:<18} {meaning}".rstrip())
    while True:
        said = typer.prompt("", default=default, prompt_suffix="> ").strip()
        if said.isdecimal() and 0 < int(said) <= len(options):
            said = list(options)[int(said) - 1]
        try:
            return check(said)
        except RlhfRayError as error:
            typer.echo(f"{error}")


def _wishes(given: Mapping[str, Any], ask: Asker[Any]) -> tuple[Wishes, list[dict[str, Any]]]:
    """(what is wanted, the example rows to write: none where there is data)."""
    from rlhf_ray.commands.init.wishes import (
        COMMANDS,
        DEFAULT_MODEL,
        Wishes,
        check_command,
        check_model,
        check_where,
    )

    def told(name: str, question: str, options: Mapping[str, str], default: str, check: Callable[[str], Any]) -> Any:
        return check(given[name]) if given[name] is not None else ask(question, options, default, check)

    command = told("command", "What do you have?", COMMANDS, "rl", check_command)
    for name in ("reward", "reward_model"):
        if given[name] is not None and command != "rl":
            raise ConfigError(f"--{name.replace('_', '-')} is for rl, and {command} has no reward; leave it out")
    names = dict(given["names"])
    seen, examples = _data(given["data"], command, names, ask)
    typer.echo(str(seen))
    models = {DEFAULT_MODEL: "a tiny one, built on the spot, to see that everything works; or a folder, or a Hub name"}
    model = told("model", "Which model?", models, DEFAULT_MODEL, check_model)
    reward = _reward(given, seen, ask) if command == "rl" else None
    places = {"local": "one process on this machine", "ray": "workers on a Ray cluster, or on this machine"}
    where = told("where", "Where?", places, "local", check_where)
    out = told("out", "Which file shall it be written to?", {}, f"{command}.yaml", Path)
    wishes = Wishes(
        command=command, data=seen, model=model, out=out, reward=reward, reward_model=given["reward_model"],
        where=where, names=tuple(names.items()),
    )  # fmt: skip
    return wishes, examples


def _data(
    given: str | None, command: Any, names: dict[str, str], ask: Asker[Any]
) -> tuple[Look, list[dict[str, Any]]]:
    from rlhf_ray.commands.init.files import example_rows, look_at
    from rlhf_ray.commands.init.look import columns_of, look
    from rlhf_ray.errors import DataError

    examples: list[dict[str, Any]] = []
    example = f"example_{command}.jsonl"

    def checked(source: str) -> Look:
        if source == example and not Path(source).exists():
            examples[:] = example_rows(command)
            return look_at(examples, example, command)
        try:
            return look(source, command, names)
        except DataError as error:
            if ask is _take_default or names or given is not None:
                raise
            columns = columns_of(source)  # raises where it is no file at all
            typer.echo(f"{error}")
        names.update(_ask_columns(command, columns))
        try:
            return look(source, command, names)
        except DataError:
            names.clear()
            raise

    if given is not None:
        return checked(given), examples
    options = {example: "a few rows that are written for you; or a file, a folder or a Hub name"}
    return ask("Which data?", options, example, checked), examples


def _ask_columns(command: Any, columns: Sequence[str]) -> dict[str, str]:
    """Role -> column, as somebody says it."""
    from rlhf_ray.commands.init.look import ROLES

    names: dict[str, str] = {}
    for role, is_needed in ROLES[command].items():
        left = [name for name in columns if name not in names.values()] or list(columns)
        usual = role if role in left else left[0] if is_needed else _NONE
        options = {**dict.fromkeys(left, ""), **({} if is_needed else {_NONE: "there is none"})}
        picked = _ask(f"Which column is the {role}?", options, usual, lambda said: _one_of(said, columns))
        names.update({role: picked} if picked != _NONE else {})
    return names


_NONE = "-"


def _one_of(said: str, columns: Sequence[str]) -> str:
    """Raises ConfigError for a column that is not there."""
    if said != _NONE and said not in columns:
        raise ConfigError(f"there is no column {said!r}; there are {', '.join(columns)}")
    return said


def _reward(given: Mapping[str, Any], seen: Look, ask: Asker[Any]) -> str | None:
    from rlhf_ray.commands.init.wishes import DEFAULT_REWARD, check_reward, rewards_for

    if given["reward"] is None and given["reward_model"] is not None:
        return None
    if given["reward"] is not None:
        return check_reward(given["reward"], seen)
    own = {DEFAULT_REWARD: "a function of your own, with an example to begin with; or another file.py:function"}
    options = {**own, **dict.fromkeys(rewards_for(seen), "")}
    return ask("What is a good answer?", options, DEFAULT_REWARD, lambda said: check_reward(said, seen))


def _write(wishes: Wishes, examples: list[dict[str, Any]], force: bool) -> None:
    import shlex

    from rlhf_ray.commands.init.files import as_lines, reward_page, write_all
    from rlhf_ray.commands.init.settings import page_of
    from rlhf_ray.config.dialect import read
    from rlhf_ray.config.load import parse_config
    from rlhf_ray.config.schema import RunConfig
    from rlhf_ray.config.supervised import SCHEMAS

    page, command = page_of(wishes), wishes.command
    parse_config(read(page), {**SCHEMAS, "rl": RunConfig}[command], source=str(wishes.out))
    files, said = {wishes.out: page}, [f"{wishes.out}"]
    if wishes.own_reward is not None and not Path(wishes.own_reward[0]).exists():
        file, function = wishes.own_reward
        files[Path(file)] = reward_page(function, wishes.data)
        said.append(f"{file} (the reward: write what you want there)")
    if examples:
        files[Path(wishes.data.source)] = as_lines(examples)
        said.append(f"{wishes.data.source} ({len(examples)} example rows)")
    write_all(files, force=force)
    columns = [f"--column {shlex.quote(f'{role}={name}')}" for role, name in wishes.names]
    source, config = shlex.quote(wishes.data.source), shlex.quote(str(wishes.out))
    typer.echo(f"\nWritten: {', '.join(said)}. Next:")
    typer.echo(f"  rlhf-ray {' '.join(['validate-data', source, '--for', command, *columns])}")
    typer.echo(f"  rlhf-ray {command} {config} --dry-run")
    typer.echo(f"  rlhf-ray {command} {config}")
