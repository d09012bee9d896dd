"""From a config to a supervised run: SFT, reward model, DPO or classifier, local or on Ray."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.clock import Clock
from rlhf_ray.config.load import on_device, validated
from rlhf_ray.config.supervised import DPOConfig, RMConfig, SFTConfig, SupervisedConfig
from rlhf_ray.data.cleaning import CleaningReport
from rlhf_ray.data.stream import Part, described
from rlhf_ray.loops.export import export
from rlhf_ray.loops.rewind import through_losses
from rlhf_ray.loops.supervised import TRAIN_SAMPLE, Batches, SplitEvaluator, Trainer, train
from rlhf_ray.roles.factory import Assets, Rank
from rlhf_ray.roles.supervised_factory import make_trainer
from rlhf_ray.run.cost import Workload
from rlhf_ray.run.directory import RunDirectory, kept_only_if_used
from rlhf_ray.run.observer import find_observer
from rlhf_ray.run.resume import frozen_clock
from rlhf_ray.run.supervised_run import SupervisedRun
from rlhf_ray.start.hardware import hardware_of
from rlhf_ray.start.supervised_inputs import (
    Splits,
    check_inputs,
    sample_prompts,
    sources_of,
    starting_model,
)
from rlhf_ray.start.supervised_notes import balance_of, notes_on_labels, notes_on_validation

Config = TypeVar("Config", bound=SupervisedConfig)

# What a reward model should be able to do before anything is optimised against it.
LEAST_ACCURACY = 0.6
MOST_LENGTH_CORRELATION = 0.6


def run_supervised(
    config: Config, run_dir: str | Path | None = None, *, resume: bool = False, observers: Iterable[Any] = (),
    clock: Clock = time.monotonic,
) -> dict[str, Any]:  # fmt: skip
    """A whole run: data, training, validation, export. Returns what summary.json holds.

    Args:
        observers: who is told of each step beside those of `config.logging`: functions f(StepRecord), or Observers.
        clock: what the run's time is measured with.
    Raises:
        RlhfRayError: whatever went wrong, saying what to do. The run directory keeps everything up to there.
    """
    config = validated(config)
    hardware = hardware_of(config)
    on_device(config, hardware.device)
    told = [find_observer(given) for given in (*config.logging.observers, *observers)]
    directory = RunDirectory.open(config.name, run_dir, resume=resume)
    reports: list[CleaningReport] = []
    with kept_only_if_used(directory):
        config = frozen_clock(config, directory)
        tokenizer, splits, plain = check_inputs(config, directory.start, reports.append)
    batches = batches_of(config, splits["train"], plain)
    config = with_steps(config, batches)
    run = SupervisedRun(
        config, directory, sources_of(reports, tokenizer), observers=[make() for make in told], clock=clock
    )
    try:
        say_what_is_read(config, reports, splits, batches, run)
        start = starting_model(config, tokenizer, splits, directory.start)
        assets = Assets(*start, hardware, config.model.trust_remote_code)
        with open_trainer(config, assets, splits, run.note, run.fault) as trainer:
            run.workload = Workload(devices=trainer.devices)
            evaluator = evaluator_of(config, tokenizer, splits)
            result = through_losses(lambda: learned(config, trainer, batches, evaluator, run), run, trainer.rejoin)
            if isinstance(config, RMConfig):
                doubt_judge(result, run)
        run.finish("finished", **result)
    except BaseException as error:
        run.fail(error)
        raise
    return directory.read_summary()


def learned(
    config: SupervisedConfig, trainer: Trainer, batches: Batches, evaluator: SplitEvaluator, run: SupervisedRun
) -> dict[str, Any]:
    """The steps, and the model at their end."""
    if isinstance(config, DPOConfig) and config.dpo.needs_reference:
        set_reference(config, trainer, batches, run)
    result = train(config, trainer, batches, evaluator, run)
    # What a reward model or a classifier has learned is not all in its adapter: its head is new.
    adapts = config.model.lora is not None and isinstance(config, SFTConfig | DPOConfig)
    export(trainer, run.directory.model, run.directory.adapter if adapts else None)
    return result


def say_what_is_read(
    config: SupervisedConfig, reports: Sequence[CleaningReport], splits: Splits, batches: Batches,
    run: SupervisedRun,
) -> None:  # fmt: skip
    """What was left out of the rows and why, what is held out, and an alarm if length alone tells the better answer."""
    notes = [*notes_on_validation(config, splits, batches.per_epoch), *notes_on_labels(config, splits["train"])]
    for line in [*map(str, reports), *notes]:
        run.note(line)
    if len(batches.parts) > 1:
        run.note(f"{described(batches.parts)}; an epoch is {batches.count} rows")
    balance = balance_of(splits["train"])
    if balance is not None:
        run.note(str(balance))
        if balance.is_strong:
            run.alarm("length_imbalance", balance.advice, run.steps_done)


def batches_of(config: SupervisedConfig, rows: Sequence[Any], plain: int) -> Batches:
    """`rows`: those of `train`, the last `plain` of them plain text."""
    plain_batch = config.plain_text_rows if isinstance(config, SFTConfig) else 0
    parts: tuple[Part, ...] = ()
    if config.data.sources:
        counts = Counter(row.source for row in rows[: len(rows) - plain])
        parts = tuple(Part(part.name, counts[part.name], part.weight) for part in config.data.parts)
    return Batches(len(rows) - plain, config.learner.batch_size, config.seed, plain, plain_batch, parts)


def with_steps(config: Config, batches: Batches) -> Config:
    """The config with the number of steps that its epochs take."""
    if config.steps is not None:
        return config
    return config.model_copy(update={"steps": max(1, round(config.epochs * batches.per_epoch))})


def evaluator_of(config: SupervisedConfig, tokenizer: Any, splits: Splits) -> SplitEvaluator:
    names = tuple(name for name in ("train", "val", "test") if name in splits)
    if not isinstance(config, SFTConfig) or not config.samples.count:
        return SplitEvaluator(names)
    prompts = sample_prompts(splits, config.samples.count)
    texts = tuple(tokenizer.batch_decode(prompts, skip_special_tokens=True))
    return SplitEvaluator(names, tuple(prompts), texts, config.samples.max_new_tokens)


def set_reference(config: DPOConfig, trainer: Any, batches: Batches, run: SupervisedRun) -> None:
    """Reference log-probabilities, computed once: a resumed run finds those of its beginning in reference.json.

    KTO also asks for what the batches of all steps mismatch. Where a run goes on for longer than that file knows of,
    they are computed anew: before its checkpoint is loaded the trainer is the policy of the beginning again.
    """
    by_step = config.dpo.kind == "kto"
    rows = [batches.rows(step) for step in range(config.steps)] if by_step else []

    def compute() -> dict[str, Any]:
        run.note("log-probabilities of the reference policy, once for the whole run")
        return {**trainer.reference_logprobs(config.dpo.reference, rows, TRAIN_SAMPLE), "steps": config.steps}

    def fits(kept: Mapping[str, Any]) -> bool:
        return not by_step or kept["steps"] >= config.steps

    trainer.set_reference(run.remember("reference", compute, fits, again=True))


def doubt_judge(result: dict[str, Any], run: SupervisedRun) -> None:
    """Alarms about a reward model that is no use as one, from its numbers on rows it has not seen."""
    after, step = result["after"], result["kept_step"]
    accuracy, correlation = after.get("val/accuracy"), after.get("val/length_correlation")
    if accuracy is not None and accuracy < LEAST_ACCURACY:
        run.alarm(
            "weak_judge", f"on held-out pairs it agrees with the labels {accuracy:.0%} of the time, and below "
            f"{LEAST_ACCURACY:.0%} its scores are mostly noise; use more or better pairs, or a larger model", step,
        )  # fmt: skip
    if correlation is not None and abs(correlation) > MOST_LENGTH_CORRELATION:
        longer = "longer" if correlation > 0 else "shorter"
        run.alarm(
            "length_bias", f"its scores correlate with the answers' length ({correlation:+.2f}), so a policy would "
            f"learn to write {longer} answers; balance the lengths of the pairs, or add a length penalty", step,
        )  # fmt: skip


@contextmanager
def open_trainer(
    config: SupervisedConfig, assets: Assets, splits: Splits, note: Callable[[str], None],
    fault: Callable[[str, str, str], None],
) -> Iterator[Trainer]:  # fmt: skip
    """The trainer as this config places it; closed at the end, also after an error. `note` hears what it waits for,
    `fault` (kind, worker, text), in another thread, of ranks that are lost and started again."""
    if config.executor == "ray":
        from rlhf_ray.remote.supervised import open_remote_trainer

        with open_remote_trainer(config, assets, splits, note, fault) as trainer:
            yield trainer
        return
    trainer = make_trainer(config, assets, splits, Rank(deadline_s=config.ray.call_deadline_s))
    try:
        yield trainer
    finally:
        trainer.engine.close()
