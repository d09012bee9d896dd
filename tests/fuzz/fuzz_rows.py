"""Spoiled rows through `validate-data` and through every command's loading: own errors only, and the two agree."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from fuzz_files import BINARY, BYTES, WRITERS, write_file
from fuzz_harness import Case, bounded, make_cases, roomy
from fuzz_mutations import STRUCTURAL, Mutation, places
from fuzz_row_seeds import SEEDS
from transformers import PreTrainedTokenizerBase

from rlhf_ray import cli
from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.load import parse_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import SFTConfig
from rlhf_ray.data.cleaning import CleaningReport
from rlhf_ray.data.datasets import load_labelled, load_labelled_answers, load_pairs, load_supervised
from rlhf_ray.data.prompts import load_prompts, load_texts
from rlhf_ray.data.validate import validate
from rlhf_ray.data.validation_report import ValidationReport
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.feedback.pairs import human_pairs
from rlhf_ray.models.tokenizers import bpe_tokenizer
from rlhf_ray.start import supervised_inputs, warm_start

MAX_LENGTH = 4096
COMMANDS = ("sft", "rm", "dpo", "kto", "classifier", "rl")
LOADERS = {"sft": load_supervised, "rm": load_pairs, "dpo": load_pairs, "kto": load_labelled_answers,
           "classifier": load_labelled}  # fmt: skip
SCRATCH = {"path": "scratch:qwen2", "tokenizer": {"path": "scratch:char"}, "scratch": {"max_length": 1 << 16}}

# A template that writes all that a row may hold; the built-in one writes neither tools nor reasoning.
EVERYTHING = (
    "{%- if tools %}{{- '<|tools|>' + (tools | tojson) + eos_token + '\\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|' + m.role + '|>\\n' }}"
    "{%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}"
    "{%- if m.content is string %}{{- m.content }}{%- elif m.content %}{%- for p in m.content %}{{- p.text }}"
    "{%- endfor %}{%- endif %}"
    "{%- for c in m.tool_calls or [] %}{{- '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) }}"
    "{%- endfor %}{{- eos_token + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)


def _role(role: Any) -> Mutation:
    def mutate(random: Random, row: Any) -> Any:
        found = [(node, key) for node, key in places(row) if key in ("role", "from")]
        if not found:
            return None
        node, key = random.choice(found)
        node[key] = role
        return row

    return mutate


def _of_other_type(random: Random, _: Any) -> Any:
    return copy.deepcopy(random.choice(SEEDS[random.choice(sorted(SEEDS))]))


def _equal_answers(_: Random, row: Any) -> Any:
    return {**row, "rejected": copy.deepcopy(row["chosen"])} if isinstance(row, dict) and "chosen" in row else None


ROWS: dict[str, Mutation] = {
    **STRUCTURAL,
    **{f"a role is {role!r}": _role(role) for role in
       ("user", "assistant", "system", "tool", "developer", "function", "bing", "USER", "", "\ud800", None, 5,
        ["user"])},
    "a row of another type": _of_other_type,
    "equal answers": _equal_answers,
    "a row without columns": lambda *_: {},
    "a row of nulls": lambda _, row: dict.fromkeys(row) if isinstance(row, dict) else None,
    "a row is a list": lambda _, row: [row],
    "a row is a text": lambda _, row: json.dumps(row),
    "a row is null": lambda *_: None,
}  # fmt: skip
# Of all rows.
FILES: dict[str, Callable[[Random, list[Any]], list[Any]]] = {
    "a row twice": lambda random, rows: [*rows, copy.deepcopy(random.choice(rows))],
    "all rows 40 times": lambda _, rows: rows * 40,
    "rows backwards": lambda _, rows: rows[::-1],
    "one row": lambda random, rows: [random.choice(rows)],
    "rows of two types": lambda random, rows: rows + SEEDS[random.choice(sorted(SEEDS))],
    "rows with columns of their own": lambda _, rows: [
        {**row, f"c{i}": i} if isinstance(row, dict) else row for i, row in enumerate(rows)
    ],
}


def row_cases(count: int) -> list[Case]:
    # Most mutations change a value: bytes and files are a third of the cases.
    return make_cases("rows", count, list(SEEDS), list(WRITERS), [*ROWS, *FILES, *BYTES])


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level, so that it reads any text; a few merges, as a real one has."""
    return bpe_tokenizer(["yes no the tide at noon in Bergen " * 20], vocab_size=300)


def check_rows(case: Case, folder: Path) -> str:
    """Run the case in an empty `folder`; returns what became of it. Raises AssertionError."""
    with roomy():
        path = _spoil(case, folder)
    template = folder / "everything.jinja"
    template.write_text(EVERYTHING)
    data = DatasetConfig(
        path=str(path), max_length=MAX_LENGTH, chat_template=("zephyr", str(template))[case.number % 2]
    )
    with bounded():
        reports = {command: _check_command(case, data, command) for command in COMMANDS}
        _check_suited(data, reports)
        _check_other_readers(data, reports)
        if case.number % 10 == 0:
            _check_command_line(data)
    good = [command for command, report in reports.items() if isinstance(report, ValidationReport) and report.is_good]
    return f"good for {', '.join(good)}" if good else "good for nothing"


def _spoil(case: Case, folder: Path) -> Path:
    random, rows = case.random, copy.deepcopy(SEEDS[case.seed])
    number = random.choice([0, *range(len(rows))])  # the first row decides what a file is
    for name in case.mutations:
        if name in ROWS:
            number = min(number, len(rows) - 1)  # an earlier mutation may have left fewer
            given = copy.deepcopy(rows[number])
            changed = ROWS[name](random, given)
            applies = changed is not None or name == "a row is null"
            rows[number] = changed if applies else STRUCTURAL["a value is null"](random, given)
        elif name in FILES:
            rows = FILES[name](random, rows)
    changes = [BYTES[name] for name in case.mutations if name in BYTES]
    return write_file(rows, case.form, changes, random, folder)


@dataclass(frozen=True)
class Loaded:
    kept: int
    left_out: dict[str, int]
    unused: dict[str, int]


def _load(data: DatasetConfig, command: str) -> Loaded | str:
    """What a run makes of the rows, or the message it ends with."""
    try:
        if command == "rl":
            prompts = load_prompts(
                data.path, tokenizer(), max_prompt_tokens=data.max_length, chat_template=data.chat_template
            )
            return Loaded(len(prompts), prompts.dropped, dict(prompts.unused))
        told: list[CleaningReport] = []
        items, _ = LOADERS[command](data, tokenizer(), seed=0, on_report=told.append)
        return Loaded(len(items), dict(told[0].dropped), dict(told[0].unused))
    except RlhfRayError as error:
        return str(error)


def _validate(data: DatasetConfig, command: str | None, *, tokens: bool = True) -> ValidationReport | str:
    try:
        report = validate(data, tokenizer() if tokens else None, max_length=data.max_length, command=command)
    except RlhfRayError as error:
        return str(error)
    report.text().encode("utf-8")  # what is printed can be printed
    report.text(colour=True).encode("utf-8")
    json.loads(report.json())
    return report


def _check_command(case: Case, data: DatasetConfig, command: str) -> ValidationReport | str:
    report, loaded = _validate(data, command), _load(data, command)
    if isinstance(report, str):
        assert report == loaded, f"{command}: validate-data ends with {report!r}, the run says {loaded!r}"
        return report
    for note in report.bad:
        assert note.why, f"{command}: a complaint without a reason"
        numbered = re.fullmatch(rf"{re.escape(data.path)}\S*:\d+", note.where)
        damaged = case.form in BINARY or set(case.mutations) & set(BYTES) or "the file is empty" in note.why
        whole = note.where.startswith(data.path) and damaged
        assert numbered or whole, f"{command}: the complaint {note} names no row"
    if report.bad:
        first = f"{report.bad[0].where}: {report.bad[0].why}"
        assert loaded == first, f"{command}: the run says {loaded!r}, validate-data {first!r}"
    elif report.kept == 0:
        assert isinstance(loaded, str) and "usable" in loaded, f"{command}: nothing is kept, and the run {loaded!r}"
    else:
        left_out = {reason: count for reason, count in report.left_out.items() if count}
        assert isinstance(loaded, Loaded), f"{command}: validate-data finds nothing, and the run ends: {loaded!r}"
        counted = {reason: count for reason, count in loaded.left_out.items() if count}
        assert (loaded.kept, counted) == (report.kept, left_out), f"{command}: {loaded} but {report}"
        assert dict(loaded.unused) == report.unused, f"{command}: {loaded.unused} but {report.unused}"
    untokenized = _validate(data, command, tokens=False)
    assert isinstance(untokenized, ValidationReport)
    more = {note.where for note in untokenized.bad} - {note.where for note in report.bad}
    assert not more, f"{command}: bad only without a tokenizer: {more}"
    return report


def _check_suited(data: DatasetConfig, reports: dict[str, ValidationReport | str]) -> None:
    """Without a command, validate-data takes the one that the rows suit."""
    report = _validate(data, None)
    if isinstance(report, ValidationReport) and report.types:
        same = reports[report.command]
        assert isinstance(same, ValidationReport) and asdict(report) == asdict(same), f"suited {report}, not {same}"


def _check_other_readers(data: DatasetConfig, reports: dict[str, ValidationReport | str]) -> None:
    """What else reads rows: made-up tokenizers, texts for perplexity, people's pairs."""
    tree = {"model": SCRATCH, "data": {"path": data.path, "chat_template": "zephyr"}}
    rl = parse_config({**tree, "rewards": [{"function": "repetition_penalty"}]}, RunConfig, "fuzz")
    sft = parse_config({**tree, "data": {**tree["data"], "max_length": MAX_LENGTH}}, SFTConfig, "fuzz")
    makers = (("rl", warm_start.make_tokenizer, rl), ("sft", supervised_inputs.make_tokenizer, sft))
    for command, make, config in makers:
        try:
            make(config)
        except RlhfRayError as error:
            report = reports[command]
            is_good = isinstance(report, ValidationReport) and report.is_good
            assert not is_good, f"{command} can load the rows, and makes no tokenizer of them: {error}"
    pairs = PairsConfig(data={"path": data.path}, model="m", rewards=[{"function": "sentiment"}])
    texts = functools.partial(load_texts, data.path)
    for read in (texts, functools.partial(texts, field="text"), functools.partial(human_pairs, pairs)):
        with contextlib.suppress(RlhfRayError):
            read()


def _check_command_line(data: DatasetConfig) -> None:
    """The command itself: its exit status is that of the report, and every line can be printed."""
    report = None
    with contextlib.suppress(RlhfRayError):
        report = validate(data)
    for options in ([], ["--json"]):
        status, out, err = run_cli("validate-data", data.path, *options)
        assert status == (2 if report is None else 0 if report.is_good else 1), (status, err)
        assert "Traceback" not in out + err and len((out + err).strip()) > 10


def run_cli(*arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command in this process. What it raises but SystemExit is a failure."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors)
                for errors in ("strict", "backslashreplace"))  # fmt: skip
    argv = mock.patch.object(sys, "argv", ["rlhf-ray", *arguments])
    status: Any = 0
    # SIGTERM ends a run with its last words; here it must end the fuzzer.
    with argv, mock.patch("signal.signal"), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    out.flush()
    err.flush()
    return status, out.buffer.getvalue().decode("utf-8"), err.buffer.getvalue().decode("utf-8")
