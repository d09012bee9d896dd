"""The Python door: every run that a YAML file can start, from a program or a notebook.

Settings are those of the commands, and are checked as theirs are. In their place may stand objects: functions as
rewards, rows as data, a model and its tokenizer. Nothing is printed but the run's progress, no process-wide setting is
left behind, errors are `rlhf_ray.errors.RlhfRayError`s, and ctrl-C ends the run and not the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.from_python import Source, config_of
from rlhf_ray.config.given import GivenRows, is_rows
from rlhf_ray.config.rewards import RewardConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import Section
from rlhf_ray.config.supervised import SCHEMAS, DPOConfig, RMConfig, SFTConfig, SupervisedConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.library_logs import borrowed
from rlhf_ray.run.result import Evaluation, Result

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_ray.run.observer import Observer as RunObserver
    from rlhf_ray.run.observer import StepRecord
    from rlhf_ray.start.session import Session

    # A file, a folder, a Hub dataset or a task by name; or the rows themselves, a mapping of columns each.
    Rows = str | Path | Sequence[Mapping[str, Any]] | Dataset | DatasetDict
    # A name as in a config, a function, `(one of these, weight)`, or all settings of a reward.
    Reward = str | Callable[..., Any] | tuple[str | Callable[..., Any], float] | Mapping[str, Any] | RewardConfig
    Model = str | Path | PreTrainedModel
    Tokenizer = str | Path | PreTrainedTokenizerBase
    # A function of a step's record, an observer that hears of alarms too, or `module:name` of either.
    Observer = Callable[[StepRecord], Any] | RunObserver | str

Supervised = TypeVar("Supervised", bound=SupervisedConfig)

_COMMANDS: dict[str, type[Section]] = {"rl": RunConfig, **SCHEMAS, "evaluate": EvalRunConfig}


def load_config(config: Source = None, command: str = "rl", **settings: Any) -> Any:
    """The checked config of a command: a RunConfig for `rl`, else its SFTConfig, RMConfig, DPOConfig, ClassifierConfig
    or EvalRunConfig.

    Args:
        config: a YAML file (also `shipped:<file>`, one that comes with the package), a mapping of settings as in such a
            file, or a config to change.
        command: rl, sft, rm, dpo, classifier or evaluate.
        settings: over it: `steps=20`, `learner={"lr": 1e-5}` (its other settings stay), `**{"learner.lr": 1e-5}`.

    Raises:
        ConfigError: every unknown setting, wrong value and contradiction, all at once.
    """
    if command not in _COMMANDS:
        raise ConfigError(f"command={command!r} has no config; choose one of {', '.join(_COMMANDS)}")
    return config_of(config, _COMMANDS[command], settings)


def rl(
    config: Source = None,
    *,
    rewards: Reward | Sequence[Reward] | None = None,
    prompts: Rows | None = None,
    eval_prompts: Rows | None = None,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    observers: Iterable[Observer] = (),
    **settings: Any,
) -> Result:
    """Reinforcement learning: GRPO, unless `algorithm={"name": ...}` says PPO, RLOO, DAPO or another.

    Args:
        config: as in `load_config`; what follows goes over it.
        rewards: what judges the answers. A function gets `prompts`, `completions` and the columns of the rows by name,
            those of them that it takes, each a list with an entry a row, and returns a list of numbers (None: not its
            to judge). It may be async. It runs in this process, where nothing can stop it but ctrl-C; docs/python.md
            says what that means.
        prompts: rows with a prompt (docs/data.md); their other columns reach the rewards.
        eval_prompts: held-out rows, for the evaluation before and after. Without them the last rows of `prompts` are
            held out: `data={"eval_size": ...}` of them; of rows that stand here, unless settings say otherwise, a
            tenth, at most 256.
        model: a Hub name, a folder, `scratch:...`, or a model of Transformers, which is copied and stays as it is.
        tokenizer: needed with a model object; otherwise the model's own.
        run_dir: where the run writes; default runs/<name>-<time>.
        resume: go on from the newest checkpoint, of `run_dir` or of the newest run of this name. What was given as an
            object must be given again.
        observers: told of each step, beside the files and the screen: functions f(record), whose `record.step` and
            `record.metrics` are a row of the result's metrics, or `rlhf_ray.run.observer.Observer`s. One that fails is
            switched off, and the run goes on.

    Raises:
        RlhfRayError: whatever is wrong, as the commands say it. The run directory keeps everything up to there.
        KeyboardInterrupt: ctrl-C; `resume=True` goes on.
    """
    settled = _rl_config(config, rewards, prompts, eval_prompts, model, tokenizer, settings)
    with borrowed(settled.device):
        from rlhf_ray.start.rl import run_rl

        return _result(run_rl(settled, run_dir, resume=resume, observers=observers))


@contextmanager
def open_roles(
    config: Source = None,
    *,
    rewards: Reward | Sequence[Reward] | None = None,
    prompts: Rows | None = None,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
    folder: str | Path | None = None,
    **settings: Any,
) -> Iterator[Session]:
    """The roles of an `rl` run without its loop: `with open_roles(...) as session:`, then `session.roles.generator`,
    `.reward`, `.learner`, `.advantages`; `session.requests(step)` is what the loop would ask. See docs/python.md.

    Args:
        folder: where the policy to start from is put, if it has to be made; a cluster's workers must be able to read
            it. None: a temporary folder of this machine.
        config, rewards, prompts, model, tokenizer, settings: as for `rl`.

    Raises:
        RlhfRayError: whatever is wrong.
    """
    settled = _rl_config(config, rewards, prompts, None, model, tokenizer, settings)
    with borrowed(settled.device):
        from rlhf_ray.start.session import open_session

        with open_session(settled, folder, print) as session:
            yield session


def sft(
    config: Source = None, *, data: Rows | None = None, eval_data: Rows | None = None, model: Model | None = None,
    tokenizer: Tokenizer | None = None, run_dir: str | Path | None = None, resume: bool = False,
    observers: Iterable[Observer] = (), **settings: Any,
) -> Result:  # fmt: skip
    """Supervised fine-tuning on texts, prompts with answers, or conversations (docs/supervised.md).

    `eval_data`: held-out rows, for validation. The rest as for `rl`.
    """
    return _supervised(SFTConfig, config, data, eval_data, model, tokenizer, run_dir, resume, observers, settings)


def rm(
    config: Source = None, *, data: Rows | None = None, eval_data: Rows | None = None, model: Model | None = None,
    tokenizer: Tokenizer | None = None, run_dir: str | Path | None = None, resume: bool = False,
    observers: Iterable[Observer] = (), **settings: Any,
) -> Result:  # fmt: skip
    """A reward model, from pairs of a better and a worse answer. Arguments as for `sft`."""
    return _supervised(RMConfig, config, data, eval_data, model, tokenizer, run_dir, resume, observers, settings)


def dpo(
    config: Source = None, *, data: Rows | None = None, eval_data: Rows | None = None, model: Model | None = None,
    tokenizer: Tokenizer | None = None, run_dir: str | Path | None = None, resume: bool = False,
    observers: Iterable[Observer] = (), **settings: Any,
) -> Result:  # fmt: skip
    """Preferences without a reward model: DPO, or IPO, KTO, ORPO, SimPO by `dpo={"kind": ...}`. Arguments as for
    `sft`."""
    return _supervised(DPOConfig, config, data, eval_data, model, tokenizer, run_dir, resume, observers, settings)


def evaluate(
    config: Source = None,
    *,
    models: Mapping[str, str | Path] | None = None,
    prompts: Rows | None = None,
    rewards: Reward | Sequence[Reward] | None = None,
    run_dir: str | Path | None = None,
    **settings: Any,
) -> Evaluation:
    """Models compared on the same prompts (docs/evaluation.md).

    Args:
        models: a folder or Hub name by the name that the results have for it; the first is the baseline.
        prompts, rewards: as for `rl`.

    Raises:
        RlhfRayError: whatever is wrong.
    """
    objects: dict[str, Any] = _rows("data.path", prompts)
    if models is not None:
        objects["models"] = {name: _text(path) for name, path in models.items()}
    if rewards is not None:
        objects["rewards"] = _rewards(rewards)
    settled = config_of(config, EvalRunConfig, {**settings, **objects})
    with borrowed(settled.device):
        from rlhf_ray.evaluation.command import run_eval

        found = run_eval(settled, run_dir, note=print)
    return Evaluation(Path(found["run_dir"]), found)


def _rl_config(
    config: Source, rewards: Any, prompts: Any, eval_prompts: Any, model: Any, tokenizer: Any,
    settings: Mapping[str, Any],
) -> RunConfig:  # fmt: skip
    objects = {
        **_model(model, tokenizer), **_rows("data.path", prompts), **_rows("data.eval_path", eval_prompts),
        **({} if rewards is None else {"rewards": _rewards(rewards)}),
    }  # fmt: skip
    return _with_held_out(config_of(config, RunConfig, {**settings, **objects}))


def _supervised(
    schema: type[Supervised], config: Source, data: Rows | None, eval_data: Rows | None, model: Model | None,
    tokenizer: Tokenizer | None, run_dir: str | Path | None, resume: bool, observers: Iterable[Observer],
    settings: Mapping[str, Any],
) -> Result:  # fmt: skip
    objects = {**_model(model, tokenizer), **_rows("data.path", data), **_rows("data.eval_path", eval_data)}
    settled = config_of(config, schema, {**settings, **objects})
    with borrowed(settled.device):
        from rlhf_ray.start.supervised import run_supervised

        return _result(run_supervised(settled, run_dir, resume=resume, observers=observers))


def _result(summary: Mapping[str, Any]) -> Result:
    return Result(Path(summary["run_dir"]), summary)


def _model(model: Any, tokenizer: Any) -> dict[str, Any]:
    if isinstance(model, Mapping):  # the whole section
        return {"model": model, **_model(None, tokenizer)}
    if tokenizer is None and model is not None and not (isinstance(model, str) and model.startswith("scratch:")):
        return {"model.path": _text(model), "model.tokenizer.path": None}  # a config's own is another model's
    given = {"model.path": model, "model.tokenizer.path": tokenizer}
    return {name: _text(value) for name, value in given.items() if value is not None}


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _rows(setting: str, rows: Any) -> dict[str, Any]:
    if rows is None:
        return {}
    if isinstance(rows, Mapping) and not is_rows(rows) and setting == "data.path":  # the whole section
        return {"data": rows}
    if isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        rows = list(rows)  # a generator is read more than once
    return {setting: _text(rows)}


def _rewards(rewards: Any) -> list[Any]:
    """What `rewards` in a config holds."""
    several = isinstance(rewards, list) or (isinstance(rewards, tuple) and not _is_weighted(rewards))
    return [_reward(reward) for reward in (rewards if several else [rewards])]


def _is_weighted(reward: Any) -> bool:
    return (
        isinstance(reward, tuple) and len(reward) == 2
        and isinstance(reward[1], int | float) and not isinstance(reward[1], bool)
    )  # fmt: skip


def _reward(reward: Any) -> Any:
    if isinstance(reward, Mapping | RewardConfig):
        return reward
    if _is_weighted(reward):
        return {"function": reward[0], "weight": reward[1]}
    return {"function": reward}


def _with_held_out(config: RunConfig) -> RunConfig:
    """Of a handful of rows in a program nobody holds out 256: a tenth, where no setting says how many."""
    given, data = config.data.path, config.data
    if not isinstance(given, GivenRows) or data.eval_path is not None or "eval_size" in data.model_fields_set:
        return config
    try:
        rows = given.of_split(data.split)
    except KeyError:
        return config  # which is said where they are read
    count = min(256, max(1, len(rows) // 10))
    size = config.eval.size if "size" in config.eval.model_fields_set else count
    return config_of(config, RunConfig, {"data.eval_size": size, "eval.size": size})
