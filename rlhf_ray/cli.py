"""The command line. Heavy packages are imported inside the commands: `rlhf-ray --help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_ray.errors import RlhfRayError, Terminated
from rlhf_ray.threads import wait_briefly

app = typer.Typer(
    name="rlhf-ray",
    help="Align language models with reinforcement learning, on one machine or on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PROMPT_SHOWN = 300  # characters

Overrides = Annotated[list[str] | None, typer.Argument(help="settings to change, e.g. learner.lr=1e-6")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="where the run writes; default runs/<name>-<time>")]


class ResumeMode(str, Enum):
    auto = "auto"
    never = "never"


Resume = Annotated[
    ResumeMode, typer.Option("--resume", help="auto: go on from the newest checkpoint; never: start anew")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and what it needs, then stop")]


@app.command()
def rl(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/grpo_arithmetic.yaml")],
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
) -> None:
    """Reinforcement learning: PPO, GRPO and their relatives."""
    _run_rl(config, overrides or [], run_dir, resume, dry_run)


ConfigFile = Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/sft_hh.yaml")]


@app.command()
def sft(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Supervised fine-tuning on answers, conversations, instructions or plain text."""
    _run_supervised("sft", config, overrides or [], run_dir, resume, dry_run)


@app.command()
def rm(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Train a reward model on pairs or rankings of answers."""
    _run_supervised("rm", config, overrides or [], run_dir, resume, dry_run)


@app.command()
def dpo(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Direct preference optimisation on pairs or rankings of answers (DPO, IPO, cDPO, SimPO, ORPO)."""
    _run_supervised("dpo", config, overrides or [], run_dir, resume, dry_run)


@app.command()
def classifier(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Fine-tune a sequence classifier on labelled texts; its folder can serve as a reward model."""
    _run_supervised("classifier", config, overrides or [], run_dir, resume, dry_run)


@app.command()
def pipeline(
    config: Annotated[Path, typer.Argument(help="a YAML file with stages, e.g. configs/pipeline_reviews.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. seed=1, or sft.learner.lr=1e-4")] = None,
    run_dir: RunDir = None,
    resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
) -> None:
    """Several commands in a row, each fed by those before it: sft -> pairs -> rm -> rl -> eval."""
    _run_pipeline(config, overrides or [], run_dir, resume, dry_run)


@app.command()
def quickstart(
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
    preferences: Annotated[
        bool,
        typer.Option("--preferences", help="the other ending: movie reviews, from preferences (values.train=<file>)"),
    ] = False,
) -> None:
    """A small transformer learns to add, from nothing, in a few minutes on a laptop. Needs no network and no GPU."""
    if preferences:
        _run_pipeline(_shipped("pipeline_reviews.yaml"), overrides or [], run_dir, resume, dry_run)
    else:
        _run_rl(_shipped("grpo_arithmetic.yaml"), overrides or [], run_dir, resume, dry_run)


@app.command()
def validate_data(
    path: Annotated[str, typer.Argument(help="a file, a folder or a Hugging Face dataset name")],
    kind: Annotated[str, typer.Option("--type", help="prompt, preference, messages, ...; auto: by columns")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="a column with a name of its own: prompt=question")] = None,
    split: Annotated[str, typer.Option(help="of a folder or a Hugging Face dataset")] = "train",
    model: Annotated[str | None, typer.Option(help="tokenize the rows too, with this model's tokenizer")] = None,
    template: Annotated[str, typer.Option(help="with --model: auto, chat, alpaca or none")] = "auto",
    chat_template: Annotated[str | None, typer.Option(help="with --model: a .jinja file, or zephyr")] = None,
    max_length: Annotated[int | None, typer.Option(help="with --model: rows with more tokens are bad")] = None,
    command: Annotated[
        str | None, typer.Option("--for", help="the command: sft, rm, dpo, classifier, rl; empty: what the rows suit")
    ] = None,
    show: Annotated[int | None, typer.Option(help="with --model: line of the row to show; empty: a good one")] = None,
    near_duplicates: Annotated[
        float | None, typer.Option(help="count rows that are so much alike an earlier one, e.g. 0.8")
    ] = None,
    against: Annotated[list[str] | None, typer.Option(help="a test file: count prompts that it asks too")] = None,
    privacy: Annotated[bool, typer.Option("--privacy", help="count mail addresses, telephone numbers, ...")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check a dataset: file and line of every bad row, and what the good ones are. Exit status 1 if any is bad."""
    from rlhf_ray.config.data import DatasetConfig
    from rlhf_ray.config.load import parse_config
    from rlhf_ray.data.quality import QualityWishes
    from rlhf_ray.data.validate import columns_from, command_from, validate

    given = {"path": path, "type": kind, "split": split, "template": template, "chat_template": chat_template}
    data = parse_config({**given, "columns": columns_from(column or [])}, DatasetConfig, source="validate-data")
    tokenizer = None
    if model is not None:
        from rlhf_ray.models.loading import load_tokenizer

        tokenizer = load_tokenizer(model)
    wishes = QualityWishes(near_duplicates, tuple(against or ()), privacy)
    told = command_from(command)
    report = validate(data, tokenizer, max_length=max_length, command=told, show=show, wishes=wishes)
    print(report.json() if as_json else report.text(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    raise typer.Exit(0 if report.is_good else 1)


@app.command(name="eval")
def evaluate(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/eval_reviews.yaml")],
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    ratings: Annotated[
        list[Path] | None,
        typer.Option(help="a filled rating sheet: add it to the finished evaluation in --run-dir; repeatable"),
    ] = None,
) -> None:
    """Compare models on the same prompts: rewards, perplexity, diversity, pass@k, win rate, red team, ratings."""
    from rlhf_ray.config.evaluation import EvalRunConfig
    from rlhf_ray.config.load import dump_config, load_config

    settings = load_config(config, overrides or [], EvalRunConfig)
    if dry_run:
        print(dump_config(settings))
        return
    _quiet_libraries(settings.device)
    from rlhf_ray.evaluation.command import add_ratings, run_eval
    from rlhf_ray.evaluation.table import print_evaluation

    # The resolved config lies in the run directory of its evaluation.
    result = add_ratings(run_dir or config.parent, ratings) if ratings else run_eval(settings, run_dir, report=print)
    print_evaluation(result)
    print(f"Everything is in {result['run_dir']}")


@app.command()
def pairs(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/pairs_reviews.yaml")],
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
) -> None:
    """Preference pairs from a model's own answers, labelled by an AI judge, reward functions or a reward model."""
    from rlhf_ray.config.feedback import PairsConfig
    from rlhf_ray.config.load import dump_config, load_config

    settings = load_config(config, overrides or [], PairsConfig)
    if dry_run:
        print(dump_config(settings))
        return
    _quiet_libraries(settings.device)
    from rlhf_ray.feedback.pairs import describe, run_pairs

    result = run_pairs(settings, run_dir, report=print)
    print(describe(result))
    print(f"The pairs are in {result['run_dir']}/pairs.jsonl: rlhf-ray rm | dpo ... data.path=<that file>")


@app.command()
def serve_reward(
    config: Annotated[Path, typer.Argument(help="a YAML file with rewards, e.g. configs/reward_server.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. port=9000")] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve reward functions over HTTP, for runs that name this machine's URL as their reward."""
    from rlhf_ray.config.load import dump_config, load_config
    from rlhf_ray.config.reward_server import RewardServerConfig

    settings = load_config(config, overrides or [], RewardServerConfig)
    if dry_run:
        print(dump_config(settings))
        return
    if settings.reward_model is not None:
        _quiet_libraries(settings.device)
    from rlhf_ray.serve import open_reward_server

    server = open_reward_server(settings)
    print(f"serving {', '.join(server.health()['rewards'])} at {server.url}; stop with Ctrl-C", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        print("rlhf-ray: stopped", file=sys.stderr)
    finally:
        server.close()


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Check this machine: versions, devices, Ray, vLLM, DeepSpeed, memory, disk. Each failing line names its remedy."""
    from rlhf_ray.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=as_json))


def _run_rl(config: Path, overrides: list[str], run_dir: Path | None, resume: ResumeMode, dry_run: bool) -> None:
    from rlhf_ray.config.load import dump_config, load_config

    settings = load_config(config, overrides)
    if dry_run:
        from rlhf_ray.plan import describe_plan

        plan = describe_plan(settings)  # first, for it may refuse
        print(dump_config(settings))
        print(plan)
        return
    _quiet_libraries(settings.device)
    from rlhf_ray.build import run_rl

    try:
        summary = run_rl(settings, run_dir, resume=resume is ResumeMode.auto)
    except KeyboardInterrupt:  # here, for typer would end with a bare exit status
        print("rlhf-ray: interrupted", file=sys.stderr)  # the run itself has said how to go on
        raise typer.Exit(130) from None
    _print_summary(summary)


def _run_pipeline(config: Path, overrides: list[str], run_dir: Path | None, resume: ResumeMode, dry_run: bool) -> None:
    from rlhf_ray.pipeline import describe_pipeline, run_pipeline

    if dry_run:
        print(describe_pipeline(config, overrides))
        return
    try:
        summary = run_pipeline(config, overrides, run_dir, resume=resume is ResumeMode.auto)
    except KeyboardInterrupt:
        print("rlhf-ray: interrupted; go on with the same command and --resume auto", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{len(summary['stages'])} stages in {summary['seconds']:.0f} s; everything is in {summary['run_dir']}")


def _run_supervised(
    command: str, config: Path, overrides: list[str], run_dir: Path | None, resume: ResumeMode, dry_run: bool
) -> None:
    from rlhf_ray.config.load import dump_config, load_config
    from rlhf_ray.config.supervised import SCHEMAS

    settings = load_config(config, overrides, SCHEMAS[command])
    if dry_run:
        from rlhf_ray.plan import describe_supervised_plan

        plan = describe_supervised_plan(settings)
        print(dump_config(settings))
        print(plan)
        return
    _quiet_libraries(settings.device)
    from rlhf_ray.build_supervised import run_supervised

    try:
        summary = run_supervised(settings, run_dir, resume=resume is ResumeMode.auto)
    except KeyboardInterrupt:
        print("rlhf-ray: interrupted", file=sys.stderr)  # the run itself has said how to go on
        raise typer.Exit(130) from None
    _print_summary(summary)


def _quiet_libraries(device: str) -> None:
    """Called before a command imports what computes."""
    import torch

    # Transformers imports DeepSpeed, where it is installed, to see whether it is there; and DeepSpeed looks for an
    # accelerator and announces what it found, unless it has been told.
    found = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", found)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for every folder that is loaded hides the one that matters


def _shipped(config: str) -> Path:
    """A file of configs/ in a checkout, or its copy that is installed with the package."""
    checkout = Path(__file__).parent.parent / "configs" / config
    return checkout if checkout.is_file() else Path(str(resources.files("rlhf_ray"))) / "configs" / config


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=f"{summary['steps']} steps in {summary['seconds']:.0f} s")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name in {**summary["before"], **summary["after"]}:
        # Some are not always there: accuracy is, only while all rewards are 0 or 1.
        values = [summary[when].get(name) for when in ("before", "after")]
        if all(value is None or isinstance(value, (int, float)) for value in values):
            table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    samples = Table("prompt", "before", "after", title="The same held-out prompts before and after")
    for old, new in zip(*(summary[when].get("samples", []) for when in ("before", "after")), strict=True):
        # Text: a completion may hold [brackets], which rich would take for markup.
        shown = [_sample_text(sample) for sample in (old, new)]
        # The end of a long prompt is what is answered; summary.json has all of it.
        asked = old["prompt"] if len(old["prompt"]) <= PROMPT_SHOWN else "…" + old["prompt"][-PROMPT_SHOWN:]
        samples.add_row(*map(Text, [asked, *shown]))
    if samples.row_count:
        console.print(samples)
    # print: rich would break a long path in two
    print(f"Everything is in {summary['run_dir']}; the model is in {summary['run_dir']}/model")


def _sample_text(sample: dict[str, Any]) -> str:
    return sample["completion"] + (f"  [{float(sample['reward']):.2f}]" if "reward" in sample else "")


def _terminated(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # a second one must not interrupt the run's last words
    raise Terminated


def main() -> None:
    """Entry point: this package's errors are one readable paragraph, not a traceback."""
    wait_briefly()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except RlhfRayError as error:
        print(f"rlhf-ray: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
