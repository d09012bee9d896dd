"""Several sources of rows in one section of data: their names, their weights, and settings of their own.

    data:
      eval_size: 64
      sources:
        - {path: math.jsonl, weight: 3, field: question}
        - {path: talk.parquet, weight: 1, template: chat}

`data: [math.jsonl, talk.parquet]` is short for their paths alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from rlhf_ray.config.given import RowsPath
from rlhf_ray.config.sections import RowsConfig, Section

# A source that is drawn less often than this would hardly come at all (and see data/stream.py).
LEAST_SHARE = 1e-4
# Of a source alone: not what a setting of the whole section is for this source.
_OWN = ("path", "name", "weight", "eval_path", "chat_template")
AS_SECTION = "empty: as in the section"


class SourceConfig(Section):
    """One of several sources. What it leaves empty is as in the section that it stands in."""

    path: RowsPath = Field(description="as in the section")
    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="in the metrics; empty: from the path")
    weight: float | None = Field(
        None, gt=0, description="share of the rows that are drawn; empty for all sources: each row once an epoch"
    )
    split: str | None = Field(None, description=AS_SECTION)
    limit: int | None = Field(None, gt=0, description=f"use only the first rows of this source; {AS_SECTION}")
    eval_path: RowsPath | None = Field(None, description="held-out rows of this source; empty: some of its own")
    template: Literal["auto", "chat", "alpaca", "none"] | None = Field(None, description=AS_SECTION)
    chat_template: str | None = Field(None, description="that of the whole section: a model has one")
    chat_template_args: dict[str, Any] | None = Field(None, description=AS_SECTION)
    system_prompt: str | None = Field(None, description=AS_SECTION)

    @property
    def label(self) -> str:
        if self.name is not None:
            return self.name
        named = self.path.startswith(("task:", "shipped:"))
        stem = Path(self.path.partition(":")[2] if named else self.path).name.split(".")[0]
        return re.sub(r"[^\w.-]+", "_", stem) or "source"


Data = TypeVar("Data", bound=RowsConfig)


@dataclass(frozen=True)
class Source(Generic[Data]):
    """A source and the whole section's settings as they hold for it. `name` is empty where there is only one path."""

    name: str
    weight: float | None
    data: Data
    key: str  # under which the config names it


class SeveralSources(RowsConfig):
    """A section that reads one `path`, or several `sources`."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        given = long_form(given)
        if isinstance(given, dict) and given.get("sources") and given.get("path") is None:
            return {**given, "path": ""}
        return given

    @property
    def parts(self) -> tuple[Source[Any], ...]:
        """Each source by itself: one, where there is one path."""
        sources: list[SourceConfig] = self.sources
        if not sources:
            return (Source("", None, self, "data"),)
        return tuple(
            Source(source.label, source.weight, self._for(source), f"data.sources.{i}")
            for i, source in enumerate(sources)
        )

    def _for(self, source: SourceConfig) -> SeveralSources:
        own = {name: value for name, value in source if value is not None and name not in _OWN}
        if source.template in ("alpaca", "none"):  # what the section says of chat templates is for the other sources
            own = {"chat_template": None, "chat_template_args": {}, "system_prompt": None, **own}
        return self.model_copy(update={**own, "path": source.path, "eval_path": source.eval_path, "sources": []})

    @property
    def paths(self) -> str:
        """Where its rows come from, for messages."""
        return ", ".join(part.data.path for part in self.parts)


def long_form(given: Any) -> Any:
    """`[a.jsonl, {path: b.jsonl}]` as the section `{sources: [{path: a.jsonl}, {path: b.jsonl}]}`."""
    if isinstance(given, list):
        given = {"sources": given}
    if not isinstance(given, dict) or not isinstance(given.get("sources"), list):
        return given
    sources = [{"path": source} if isinstance(source, str) else source for source in given["sources"]]
    return {**given, "sources": sources}


def source_problems(data: SeveralSources, name: str = "data") -> list[str]:
    """What several sources cannot have together."""
    sources: list[SourceConfig] = data.sources
    if not sources:
        return [] if data.path else [f"{name}.path is empty; name a file or a dataset, or set {name}.sources"]
    problems = []
    if data.path:
        problems.append(
            f"{name}.path={data.path} and {name}.sources both say where the rows are; remove one of them (on the "
            f"command line: {name}.sources=[] or {name}.path=null)"
        )
    by_label = defaultdict(list)
    for i, source in enumerate(sources):
        by_label[source.label].append(f"{name}.sources.{i}")
        if source.chat_template not in (None, data.chat_template):
            problems.append(
                f"{name}.sources.{i}.chat_template={source.chat_template}: a model has one chat template, which is "
                f"saved with it; set {name}.chat_template for all, or {name}.sources.{i}.template=none or alpaca"
            )
        if source.eval_path is not None and data.eval_path is not None:
            problems.append(
                f"{name}.eval_path and {name}.sources.{i}.eval_path both say what is held out; remove one of them"
            )
    for label, keys in by_label.items():
        if len(keys) > 1:
            problems.append(
                f"{' and '.join(keys)} are both called {label}, and metrics go by name; set {keys[1]}.name to another"
            )
    return problems + _weight_problems(sources, name)


def _weight_problems(sources: list[SourceConfig], name: str) -> list[str]:
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        return []
    if None in weights:
        without = f"{name}.sources.{weights.index(None)}"
        return [f"{without} has no weight, and others have one; set {without}.weight, or remove all weights"]
    return [
        f"{name}.sources.{i}.weight={weight} is less than a ten-thousandth of all weights, so its rows would hardly "
        "come; raise it, or remove the source"
        for i, weight in enumerate(weights)
        if weight / sum(weights) < LEAST_SHARE
    ]
