"""`rlhf-ray generate`: a model answers one prompt, a file of them, or on the terminal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.commands.options import interruptible
from rlhf_ray.models.library_logs import quiet_libraries

if TYPE_CHECKING:
    from rlhf_ray.commands.generate.writer import Writer


def generate(
    model: Annotated[str, typer.Argument(help="a run directory (its model/), a model folder, or a Hub name")],
    prompt: Annotated[str | None, typer.Option(help="answer this one prompt; the answer alone goes to stdout")] = None,
    file: Annotated[
        str | None, typer.Option(help="answer each prompt of this data file of any type, or each line of a .txt file")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="with --file: write the JSON lines there, not to stdout")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="of each answer")] = 512,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.7,
    top_p: Annotated[float, typer.Option(help="sample among the likeliest tokens that have this much probability")] = 1,
    seed: Annotated[int, typer.Option(help="the same seed gives the same answers")] = 0,
    system: Annotated[str | None, typer.Option(help="a system message; default: the run's data.system_prompt")] = None,
    template: Annotated[
        str, typer.Option(help="auto, chat, alpaca or none; auto: the run's own, or chat where the tokenizer has one")
    ] = "auto",
    chat_template: Annotated[str | None, typer.Option(help="a .jinja file, or zephyr; default: the model's")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the code that comes with the model")
    ] = False,
) -> None:
    """Let a model write: one prompt, a file of prompts, or, with neither, a chat on the terminal."""
    from rlhf_ray.config.generate import GenerateConfig
    from rlhf_ray.config.load import parse_config
    from rlhf_ray.errors import ConfigError

    given = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "system": system,
        "template": template, "chat_template": chat_template, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    config = parse_config(given, GenerateConfig, source="generate")
    if prompt is not None and file is not None:
        raise ConfigError("generate: --prompt and --file; give one of them")
    if prompt is not None and not prompt.strip():
        raise ConfigError("generate: --prompt is empty; give a text, or leave it out for a chat")
    if out is not None and file is None:
        raise ConfigError("generate: --out is for the answers to a --file; a single answer goes to stdout")
    if out is not None and (out.is_dir() or not out.parent.is_dir() or str(out) == file):
        raise ConfigError(f"generate: --out {out} is a folder, lies in none, or is --file; name another file")
    quiet_libraries(device)
    from rlhf_ray.commands.generate.writer import Writer

    with interruptible():
        writer = Writer(model, config)
        if file is not None:
            _answer_file(writer, file, out)
        elif prompt is not None:
            _answer_one(writer, prompt)
        else:
            _chat(writer)


def _answer_one(writer: Writer, prompt: str) -> None:
    ids = writer.encode(prompt)
    answer = writer.answer(ids, live=writer.live(ids, _write))
    _write("\n")
    if answer.finish_reason != "stop":
        _say(f"({writer.cut_off})")


def _answer_file(writer: Writer, file: str, out: Path | None) -> None:
    from rlhf_ray.commands.generate.writer import answered_rows, write_rows
    from rlhf_ray.errors import StorageError

    prompts = writer.read(file)
    if prompts.left_out:
        _say(f"{file}: prompts left out: {prompts.left_out}")
    rows = answered_rows(writer, prompts)
    if out is None:
        write_rows(rows, _write)
        return
    writer.generator  # noqa: B018  loaded before an older file is overwritten
    try:
        with open(out, "w", encoding="utf-8", buffering=1) as target:  # an answer is in the file once it is written
            count = write_rows(rows, target.write)
    except OSError as error:
        raise StorageError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
    _say(f"{count} answers are in {out}")


def _chat(writer: Writer) -> None:
    from rlhf_ray.commands.generate.chat import COMMANDS, chat

    writer.generator  # noqa: B018  loaded before somebody types
    _say(f"{writer.path}: {writer.form}; {COMMANDS}")
    chat(writer, _typed_line if sys.stdin.isatty() else _piped_line, _write, _say)


def _typed_line() -> str | None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys, and earlier lines
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _piped_line() -> str | None:
    return sys.stdin.readline() or None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    """What is no answer: stdout holds answers alone."""
    print(text, file=sys.stderr)
