"""Environment variables that a config gives to the workers on Ray (`ray.env`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from rlhf_ray.config.redacted import redacted_settings
from rlhf_ray.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What says who a process is, or where its Ray: another value makes it somebody else.
_SET_BY_THE_RUN = re.compile(r"RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|CUDA_VISIBLE_DEVICES|RAY_.*")


def _as_text(variables: Any) -> Any:
    """`NCCL_IB_TIMEOUT: 22` is a number in YAML."""
    if not isinstance(variables, Mapping):
        return variables
    return {name: str(value) if type(value) is int else value for name, value in variables.items()}


def _checked(variables: dict[str, str | None]) -> dict[str, str | None]:
    for name, value in variables.items():
        if not _NAME.fullmatch(name):
            raise PydanticCustomError("name", "'{name}' is no name of an environment variable", {"name": name})
        if _SET_BY_THE_RUN.fullmatch(name):
            raise PydanticCustomError("taken", "the run itself sets {name}; leave it out", {"name": name})
        if value is not None and "\0" in value:
            raise PydanticCustomError("value", "a zero byte ends a value, and {name} holds one", {"name": name})
    return variables


WorkerVariables = Annotated[
    dict[str, str | None],
    BeforeValidator(_as_text),
    AfterValidator(_checked),
    Field(
        description="environment variables of every worker; empty: what the command itself has. Values that look "
        "secret by their name are hidden in what is written, and not shown by Ray"
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Variables:
    """`ray.env`, split.

    Attributes:
        shown: a worker starts with them. Ray shows them to everybody who may look at its dashboard.
        quiet: secrets by name, and what the command itself has: a worker sets them when it runs already, before it
            imports its role's libraries.
    """

    shown: Mapping[str, str] = field(default_factory=dict)
    quiet: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, variables: Mapping[str, str | None]) -> Variables:
        """Raises ConfigError for an empty one that the command does not have."""
        shown, quiet = {}, {}
        for name, value in variables.items():
            if value is None:
                if name not in os.environ:
                    raise ConfigError(
                        f"ray.env.{name} is empty, which takes the value that this command has in its environment, "
                        "and it has none; export it before the command, or give a value"
                    )
                quiet[name] = os.environ[name]
            elif redacted_settings({name: value}) != {name: value}:
                quiet[name] = value
            else:
                shown[name] = value
        return cls(shown, quiet)
