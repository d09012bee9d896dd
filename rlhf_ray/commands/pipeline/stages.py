"""Runs the stages of a pipeline, one command after the other, each in a process of its own.

A process a stage: what it held of a GPU, of Ray or of DeepSpeed is gone when it ends, and each stage can be repeated
by hand with the command that is printed. The state of a pipeline is its stages' own run directories:

    <run>/config.yaml  summary.json  stages/<stage>.yaml  <stage>/summary.json ...
"""

from __future__ import annotations

import atexit
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pydantic import BaseModel

from rlhf_ray.config.extras import needs_of, require
from rlhf_ray.config.load import dump_config, parse_config, read_yaml
from rlhf_ray.config.pipeline import PipelineConfig, Stage, load_pipeline, resolve
from rlhf_ray.config.redacted import hidden_in, redacted_settings
from rlhf_ray.errors import AGAIN, INTERRUPTED, ConfigError, StageError, Terminated
from rlhf_ray.run.directory import RunDirectory, ended_by
from rlhf_ray.run.resume import begun
from rlhf_ray.run.storage import read_object, write_atomically
from rlhf_ray.start.preflight import preflight

# A stage that is told to stop may want to finish a step and write a checkpoint.
_SECONDS_TO_STOP = 60


def run_pipeline(
    path: str | Path, overrides: Sequence[str] = (), run_dir: str | Path | None = None, *, resume: bool = False
) -> dict[str, Any]:
    """Every stage in order; returns what summary.json holds.

    With `resume`, stages that have finished are kept and the one that failed goes on from its newest checkpoint. A
    script that calls this needs `if __name__ == "__main__":`, as for every use of `multiprocessing`.

    Raises:
        ConfigError: a stage cannot be meant so, needs a package that is missing, or has changed since it finished.
        StageError: a stage failed; what the earlier ones made is kept.
    """
    pipeline, of_stages = load_pipeline(path, overrides)
    root = Path(path).parent
    planned = resolve(pipeline, root, Path("."), of_stages)  # complains before a folder is made
    _refuse_secrets(planned)
    require(need for stage in planned for need in needs_of(stage.config))
    directory = RunDirectory.open(pipeline.name, run_dir, resume=resume)
    pipeline = pipeline.model_copy(update={"clock": pipeline.clock or begun(directory)})  # all stages have one date
    stages = resolve(pipeline, root, directory.path.resolve(), of_stages)
    done = [stage.name for stage in stages if _finished(stage, stages, directory)]
    directory.write_config(dump_config(pipeline))
    try:
        for number, stage in enumerate(stages, start=1):
            title = f"stage {number}/{len(stages)} {stage.name}"
            if stage.name in done:
                print(f"{title}: finished before, kept", flush=True)
                continue
            _run_stage(stage, directory, title)
    except BaseException as error:
        _summarize(pipeline, stages, directory, **ended_by(error))
        raise
    return _summarize(pipeline, stages, directory, status="finished")


def describe_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Every stage's command, resolved settings and what was opened for it, for `--dry-run`.

    Raises RlhfRayError: as `run_pipeline` does, and for what a stage could not read.
    """
    pipeline, of_stages = load_pipeline(path, overrides)
    unmade = Path("RUN")
    stages = resolve(pipeline, Path(path).parent, unmade, of_stages)
    _refuse_secrets(stages)
    require(need for stage in stages for need in needs_of(stage.config))
    opened = {stage.name: preflight(stage.config, unmade) for stage in stages}
    parts = [
        f"# stage {stage.name}: rlhf-ray {stage.command}"
        + (f", reads from {', '.join(stage.needs)}" if stage.needs else "")
        + "\n".join(["", dump_config(stage.config), *opened[stage.name], ""])
        for stage in stages
    ]
    return "\n".join(parts)


def _refuse_secrets(stages: Sequence[Stage]) -> None:
    """Raises ConfigError for one that stands in the settings of a stage: its file could not hold it."""
    for stage in stages:
        if names := hidden_in(redacted_settings(stage.config.model_dump(mode="json"))):
            raise ConfigError(
                f"stage {stage.name}: {', '.join(names)} may hold a secret (a password, a value in a URL's query, a "
                "key). A stage is started with a file, and no secret is written into one; keep it in an environment "
                "variable (token_env of a reward server, api_key_env of a judge)"
            )


def command_of(stage: Stage, directory: RunDirectory) -> list[str]:
    """The command line of a stage: a user may run it by hand."""
    file = _config_file(stage, directory)
    again = ["--resume", "auto"] if stage.command in _RESUMABLE and stage.folder.is_dir() else []
    return ["rlhf-ray", stage.command, str(file), "--run-dir", str(stage.folder), *again]


# Those that write checkpoints; the others are done again from their start.
_RESUMABLE = {"sft", "rm", "dpo", "classifier", "rl"}


def _config_file(stage: Stage, directory: RunDirectory) -> Path:
    return directory.path / "stages" / f"{stage.name}.yaml"


def _run_stage(stage: Stage, directory: RunDirectory, title: str) -> None:
    file = _config_file(stage, directory)
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, dump_config(stage.config))
    if stage.command not in _RESUMABLE and stage.folder.is_dir():
        shutil.rmtree(stage.folder)  # killed half-way: it would take its own remains for another run
    command = command_of(stage, directory)
    print(f"{title}: {shlex.join(command)}", flush=True)
    started = time.monotonic()
    status = run_command(command[1:])
    seconds = round(time.monotonic() - started, 1)
    if status:
        directory.event("stage_failed", stage=stage.name, exit_status=status, seconds=seconds)
        if status in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        raise StageError(
            f"{title} failed ({_describe(status)}); its own message stands above. "
            f"Mend the cause, then go on there: the same command with --run-dir {directory.path} --resume auto",
            status if status > 0 else AGAIN,
        )
    directory.event("stage_finished", stage=stage.name, seconds=seconds)


def run_command(arguments: Sequence[str]) -> int:
    """`rlhf-ray <arguments>` in a process of its own: its exit status, or minus the signal that ended it."""
    process = _processes().Process(target=_command, args=(tuple(arguments),))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt as reason:
        if isinstance(reason, Terminated):
            process.terminate()  # Ctrl-C in a terminal reaches the stage, too; this may not have
        process.join(_SECONDS_TO_STOP)
        raise
    finally:
        process.kill()
    return process.exitcode


@cache
def _processes() -> BaseContext:
    """Where processes come from: on Linux from one that has imported, once, what takes every stage seconds."""
    context = get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["rlhf_ray.start.rl", "rlhf_ray.start.supervised"])
    return context


def _command(arguments: Sequence[str]) -> None:
    sys.argv = ["rlhf-ray", *arguments]
    try:
        resolve_name("rlhf_ray.cli:main")()  # by name, as a command line has it: this module is below the command line
    finally:
        atexit._run_exitfuncs()  # before Python 3.12 a process from `multiprocessing` leaves them out


def _describe(status: int) -> str:
    return f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"


@dataclass(frozen=True)
class _Result:
    summary: dict[str, Any]
    time: float  # seconds since the epoch


def _result(stage: Stage) -> _Result | None:
    """What a stage has left, if it came to its end."""
    file = stage.folder / "summary.json"
    summary = read_object(file)
    return _Result(summary, file.stat().st_mtime) if summary.get("status") == "finished" else None


def _finished(stage: Stage, stages: Sequence[Stage], directory: RunDirectory) -> bool:
    """Whether a stage need not run again.

    Raises:
        ConfigError: it has finished, but with other settings or from older inputs than the ones that it would have
            now. Nobody's results are thrown away silently.
    """
    result, file = _result(stage), _config_file(stage, directory)
    if result is None:
        return False
    remedy = f"delete {stage.folder} to run it again, or set --run-dir to a new folder"
    if not _says(file, stage.config):
        raise ConfigError(f"stage {stage.name} has finished with other settings than it has now; {remedy}")
    for source in stages:
        if source.name in stage.needs:
            made = _result(source)
            if made is None or made.time > result.time:
                raise ConfigError(f"stage {stage.name} has finished before its input {source.name!r} did; {remedy}")
    return True


def _says(file: Path, config: BaseModel) -> bool:
    """Whether a file of settings means this config: a setting that the file is too old to know has its default."""
    try:
        return dump_config(parse_config(read_yaml(file), type(config), source=str(file))) == dump_config(config)
    except ConfigError:  # not there, or a setting that is no more
        return False


def _summarize(
    pipeline: PipelineConfig, stages: Sequence[Stage], directory: RunDirectory, **end: str
) -> dict[str, Any]:
    of_stages = {}
    for stage in stages:
        result = _result(stage)
        of_stages[stage.name] = {
            "command": stage.command,
            "run_dir": str(stage.folder),
            "status": "finished" if result else "not finished",
            "seconds": result.summary.get("seconds") if result else None,
        }
    spent = [event["seconds"] for event in directory.read_events() if event["event"].startswith("stage_")]
    summary = {
        "name": pipeline.name,
        "run_dir": str(directory.path),
        **end,
        "seconds": round(sum(spent), 1),
        "stages": of_stages,
    }
    directory.write_summary(summary)
    return summary
