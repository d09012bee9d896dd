"""Spoiled config files through the real commands with `--dry-run`: each is refused in a paragraph, or is valid."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml
from fuzz_harness import Case, bounded, make_cases, roomy
from fuzz_mutations import STRUCTURAL, places

from rlhf_ray import cli
from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.load import dump_config, parse_config, read_yaml
from rlhf_ray.config.reward_server import RewardServerConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import SCHEMAS

ROOT = Path(__file__).parent.parent.parent
HERE = "@@HERE@@"
SINGLE = {**SCHEMAS, "rl": RunConfig, "eval": EvalRunConfig, "pairs": PairsConfig, "serve-reward": RewardServerConfig}

# The least that each command takes.
MINIMAL: dict[str, dict[str, Any]] = {
    "rl": {
        "model": {"path": "scratch:qwen2", "tokenizer": {"path": "scratch:char", "alphabet": "ab"}},
        "data": {"path": "prompts.jsonl", "max_prompt_tokens": 64},
        "rewards": [{"function": "regex", "args": {"pattern": "a+"}}],
    },
    **{
        command: {"model": {"path": "scratch:gpt2", "tokenizer": {"path": "scratch:word"}},
                  "data": {"path": "rows.jsonl", "max_length": 64}}
        for command in SCHEMAS
    },
    "eval": {"data": {"path": "prompts.jsonl"}, "models": {"a": "some/model"}},
    "pairs": {"data": {"path": "prompts.jsonl"}, "model": "some/model", "rewards": [{"function": "sentiment"}]},
    "serve-reward": {"rewards": [{"function": "sentiment"}]},
    "pipeline": {
        "values": {"rows": "rows.jsonl"},
        "stages": [
            {"name": "sft", "run": "sft", "set": {
                "model": {"path": "scratch:gpt2", "tokenizer": {"path": "scratch:word"}},
                "data": {"path": "${rows}", "max_length": 64}}},
            {"name": "dpo", "run": "dpo", "set": {"model.path": "${sft.model}", "data.path": "${rows}"}},
        ],
    },
}  # fmt: skip


def _bomb(first: str, of: Callable[[str], str]) -> str:
    """Ten levels, each of which names the one before it nine times: 9^10 values in half a kilobyte."""
    levels = [f"&b0 {first}"]
    levels += [f"&b{i} {of(', '.join([f'*b{i - 1}'] * 9))}" for i in range(1, 11)]
    return f"[{', '.join(levels)}]"


def run_command(canary: Path) -> str:
    return f"touch {canary}"


# YAML in the place of a value. {canary} is a file that must never be made.
RAW: dict[str, str] = {
    "a bomb of lists": _bomb("[x, x]", lambda names: f"[{names}]"),
    "a bomb of mappings": _bomb("{a: x}", lambda names: f"{{list: [{names}]}}"),
    "a bomb of merges": _bomb("{a: x}", lambda names: f"{{<<: [{names}]}}"),
    "a circle": "&c [*c]",
    "a circle of mappings": "&c {a: {b: *c}}",
    "a circle of merges": "&c {<<: *c, a: 1}",
    "an alias of nothing": "*nobody",
    "a shared value": "[&v {a: 1}, *v, *v]",
    "Python code": '!!python/object/apply:os.system ["touch {canary}"]',
    "a Python object": '!!python/object/new:subprocess.Popen [["touch", "{canary}"]]',
    "a Python name": "!!python/name:os.system",
    "an unknown tag": "!secret {a: 1}",
    "binary": "!!binary /9j/4AAQ",
    "broken binary": "!!binary '*'",
    "a set": "!!set {a, b}",
    "ordered pairs": "!!omap [{a: 1}, {b: 2}]",
    "a date": "2024-02-29",
    "a day that is none": "2024-02-30",
    "a time": "2001-12-14t21:59:43.10-05:00",
    "an empty integer": "!!int ''",
    "an integer that is none": "!!int abc",
    "a float that is none": "!!float abc",
    "a truth that is none": "!!bool maybe",
    "a date that is none": "!!timestamp abc",
    "a null of text": "!!null abc",
    "a text by tag": "!!str 12",
    "numbers of other bases": "[0x1F, 0o17, 017, 0b11, 1_000, 190:20:30, 1e3, +1.e5, .5, -.inf]",
    "an integer of 5,000 digits": "9" * 5000,
    "a list as a key": "{[a, b]: c}",
    "a number as a key": "{1: a, 2.5: b, null: c, true: d, 2024-01-01: e}",
    "a key twice": "{a: 1, a: 2}",
    "an open quote": '"never closed',
    "an open bracket": "[[[",
    "wrong escapes": r'"\q \ud800 \U00110000"',
    "an anchor on an anchor": "&a &b c",
    "a folded text": "|2\n   a\n  b",
    "100,000 brackets": "[" * 100_000,
    "nested 3,000 deep": "[" * 3000 + "]" * 3000,
    "nested 100,000 deep": "{a: " * 100_000 + "x" + "}" * 100_000,
    "questions 100,000 deep": "? " * 100_000,
    "a line of 5 MB": "x" * 5_000_000,
}


def _raw(text: str) -> Callable[[Random, Any], Any]:
    """A mutation that leaves a place to be filled with `text` once the tree is written."""

    def mutate(random: Random, tree: Any) -> Any:
        found = places(tree)
        if not found:
            return None
        container, key = random.choice(found)
        container[key] = HERE + text
        return tree

    return mutate


def _scaled(factor: float) -> Callable[[Random, Any], Any]:
    def mutate(random: Random, tree: Any) -> Any:
        found = [(node, key) for node, key in places(tree) if type(node[key]) in (int, float)]
        if not found:
            return None
        container, key = random.choice(found)
        value = container[key] * factor
        container[key] = int(value) if isinstance(container[key], int) else value
        return tree

    return mutate


# Whole files: text -> bytes.
TEXTUAL: dict[str, Callable[[Random, str], bytes]] = {
    "a byte-order mark": lambda _, text: text.encode("utf-8-sig"),
    "UTF-16": lambda _, text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda _, text: text.encode("utf-16-le"),
    "Latin-1": lambda _, text: f"# \xe9\xff\n{text}".encode("latin-1", "replace"),
    "NUL bytes": lambda random, text: _inserted(random, text, "\0" * 3),
    "an escape character": lambda random, text: _inserted(random, text, "\x1b[2J"),
    "a tab": lambda random, text: _inserted(random, text, "\n\t"),
    "cut short": lambda random, text: text[: random.randrange(len(text))].encode(),
    "Windows line ends": lambda _, text: text.replace("\n", "\r\n").encode(),
    "old Mac line ends": lambda _, text: text.replace("\n", "\r").encode(),
    "one line": lambda _, text: text.replace("\n", " ").encode(),
    "no indentation": lambda _, text: re.sub(r"^ +", "", text, flags=re.MULTILINE).encode(),
    "two documents": lambda _, text: f"{text}\n---\n{text}".encode(),
    "the file twice": lambda _, text: (text * 2).encode(),
    "an end of document": lambda _, text: f"{text}\n...\ngarbage: [".encode(),
    "a directive": lambda _, text: f"%YAML 9.9\n---\n{text}".encode(),
    "nothing": lambda *_: b"",
    "comments only": lambda *_: b"# nothing\n\n# here\n",
    "a text": lambda *_: b"just words\n",
    "a list": lambda *_: b"- a\n- b\n",
    "a number": lambda *_: b"42\n",
    "brackets and braces": lambda _, text: _in_brackets(text).encode(),
    "lists 100,000 deep": lambda *_: b"- " * 100_000,
    "random bytes": lambda random, _: random.randbytes(300),
    "a byte is another": lambda random, text: _flipped(random, text.encode()),
}


def _in_brackets(text: str) -> str:
    try:
        return yaml.dump(yaml.safe_load(text), default_flow_style=True, width=1 << 20)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError):
        return text  # another mutation has spoiled it before


def _inserted(random: Random, text: str, what: str) -> bytes:
    at = random.randrange(len(text))
    return (text[:at] + what + text[at:]).encode()


def _flipped(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


TREES = {
    **STRUCTURAL,
    **{f"a value is {name}": _raw(text) for name, text in RAW.items()},
    **{f"a number times {factor:g}": _scaled(factor) for factor in (-1, 0, 0.5, 1e3, 1e6, 1e9, 1e12, 1e18)},
}


@dataclass(frozen=True)
class Source:
    """A valid config. `stage` is the file of a pipeline's stage that is spoiled in its place."""

    command: str
    name: str  # of the file that the command is given
    stage: str | None = None

    @property
    def file(self) -> str:
        return self.stage or self.name


def sources() -> dict[str, Source]:
    """Every shipped config by the command in its comment, every file of a pipeline's stages, and the minimal ones."""
    found = {f"minimal {command}": Source(command, f"minimal_{command}.yaml") for command in MINIMAL}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        command = re.search(rf"^#.*?rlhf-ray ([\w-]+) +configs/{path.name}", text, re.MULTILINE)[1]
        found[path.name] = Source(command, path.name)
        if command == "pipeline":
            stages = {stage["config"] for stage in yaml.safe_load(text)["stages"] if "config" in stage}
            found |= {f"{path.name}, {name}": Source(command, path.name, name) for name in sorted(stages)}
    return found


def config_cases(count: int) -> list[Case]:
    return make_cases("config", count, list(sources()), ["file", "file", "overrides"], [*TREES, *TEXTUAL])


def check_config(case: Case, folder: Path) -> str:
    """Run the case in an empty `folder`; returns what became of it: valid or refused. Raises AssertionError."""
    source, canary = sources()[case.seed], folder / "executed"
    for path in (ROOT / "configs").glob("*.yaml"):
        shutil.copy(path, folder)
    for command, tree in MINIMAL.items():
        (folder / f"minimal_{command}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    with roomy():
        overrides = _spoil(case, source, folder, canary)
    status, out, err = _dry_run(source.command, folder / source.name, overrides)
    assert not canary.exists(), "a config was executed"
    assert "Traceback" not in out + err
    if status == 0:
        _check_readable(source.command, out)
        return "valid"
    assert status in (2, 3), f"exit status {status}"
    assert len(err.strip()) > 20 and err.startswith(("rlhf-ray: ", "Usage:")), f"no readable refusal: {err[:300]!r}"
    assert len(err) < 100_000, f"a refusal of {len(err)} characters"
    return "refused"


def _spoil(case: Case, source: Source, folder: Path, canary: Path) -> list[str]:
    """Write the spoiled file; returns the overrides, which stand for the changed values where the form is that."""
    random, file = case.random, folder / source.file
    tree = good = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name in case.mutations:
        if name in TREES:
            changed = TREES[name](random, copy.deepcopy(tree))
            tree = tree if changed is None else changed
    textual = [TEXTUAL[name] for name in case.mutations if name in TEXTUAL]
    if case.form == "overrides" and not textual:
        return _differences(good, tree, canary)
    data = _written(tree, canary)
    for change in textual[:1]:
        data = change(random, data.decode("utf-8"))
    file.write_bytes(data)
    return []


def _differences(good: Any, tree: Any, canary: Path, prefix: str = "") -> list[str]:
    """`a.b=value` for every setting of `tree` that is another than in `good`."""
    if isinstance(good, dict) and isinstance(tree, dict) and good:
        keys = [key for key in tree if key not in good or repr(good[key]) != repr(tree[key])]
        below = {key: f"{prefix}.{key}" if prefix else str(key) for key in keys}
        return [text for key in keys for text in _differences(good.get(key), tree[key], canary, below[key])]
    value = _written(tree, canary, flow=True).decode("utf-8").removesuffix("\n...\n").strip()
    return [f"{prefix}={value[:100_000]}"]  # a command line is bounded


def _written(tree: Any, canary: Path, *, flow: bool = False) -> bytes:
    """As YAML. Values marked HERE are written raw."""
    marked: list[str] = []

    def mark(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: mark(value) for key, value in node.items()}
        if isinstance(node, list):
            return [mark(value) for value in node]
        if isinstance(node, str) and node.startswith(HERE):
            marked.append(node.removeprefix(HERE))
            return f"{HERE}{len(marked) - 1}{HERE}"
        return node

    style = {"default_flow_style": True, "width": 1 << 30} if flow else {}
    text = yaml.dump(mark(tree), Dumper=_NoAliases, sort_keys=False, allow_unicode=True, **style)
    for number, raw in enumerate(marked):
        # Another mutation may have made text of the mark, quoted or cut in two.
        text = re.sub(rf"(['\"]?){HERE}{number}{HERE}\1", lambda _, raw=raw: raw.replace("{canary}", str(canary)), text)
    return text.encode("utf-8", "surrogatepass")


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dry_run(command: str, path: Path, overrides: Sequence[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command in this process. Whatever it raises but SystemExit is a failure.

    Settings only: what a dry run opens beside them is not there, and is spoiled in `fuzz_rows.py`.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors) for errors in ("strict", "replace"))
    argv = ["rlhf-ray", command, str(path), "--dry-run", "--", *overrides]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        opens_nothing = mock.patch("rlhf_ray.start.preflight.preflight", return_value=[])
        in_pipelines = mock.patch("rlhf_ray.commands.pipeline.stages.preflight", return_value=[])
        printed = (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err))
        with opens_nothing, in_pipelines, mock.patch.object(sys, "argv", argv), printed[0], printed[1]:
            with bounded():
                try:
                    cli.main()
                    status: Any = 0
                except SystemExit as end:
                    status = end.code or 0
            out.flush()
            err.flush()
    finally:
        signal.signal(signal.SIGTERM, handler)
    return status, out.buffer.getvalue().decode("utf-8"), err.buffer.getvalue().decode("utf-8")


def _check_readable(command: str, out: str) -> None:
    """What a dry run prints is a config that reads back as itself."""
    assert out.strip(), "a valid config, and nothing printed"
    if command in SINGLE:
        schema = SINGLE[command]
        text = "\n".join(line for line in out.split("\n") if not line.startswith("#"))
        with contextlib.ExitStack() as stack:
            import tempfile

            file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "again.yaml"
            file.write_text(text, encoding="utf-8", newline="")
            config = parse_config(read_yaml(file), schema, "again")
        assert dump_config(config).strip() == text.strip()
