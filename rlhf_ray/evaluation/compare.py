"""Any number of models on the same prompts: the comparison behind `rlhf-ray eval`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.evaluation import EvalRunConfig, PerplexityConfig, RedTeamConfig, SampledModelConfig
from rlhf_ray.config.extras import needs_of, require
from rlhf_ray.config.rewards import right_by
from rlhf_ray.config.schema import PromptsConfig
from rlhf_ray.data.prompts import PromptSet, load_texts
from rlhf_ray.errors import ConfigError
from rlhf_ray.evaluation.answers import (
    AnsweringModel,
    Answers,
    check_fits,
    check_rewards,
    common_prompts,
    open_model,
    read_prompts,
    shown_prompt,
    tokenizer_of,
)
from rlhf_ray.evaluation.metrics import reward_metrics, text_metrics
from rlhf_ray.evaluation.passk import mean_pass_at_k
from rlhf_ray.evaluation.perplexity import Perplexity, measure_perplexity
from rlhf_ray.evaluation.text import self_bleu
from rlhf_ray.evaluation.winrate import outcomes_of_scores, win_rate
from rlhf_ray.rewards.judge import Verdict, compare_both_orders, open_judge

Note = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What one model did."""

    answers: Answers
    perplexity: Perplexity | None
    red_team: Answers | None


@dataclass(frozen=True)
class Inputs:
    """What a comparison reads before it loads a model: prompts by model, and texts for the perplexity."""

    prompts: dict[str, PromptSet]
    red_team: dict[str, PromptSet]
    texts: list[str]


@dataclass(frozen=True)
class Comparison:
    """`result` is eval.json. `answers` holds each model's; `prompts` are as people read them."""

    result: dict[str, Any]
    prompts: tuple[str, ...]
    answers: dict[str, Answers]


def compare(config: EvalRunConfig, note: Note = lambda line: None) -> Comparison:
    """Every model answers every prompt, one model after the other in memory; then all are measured and compared.

    Raises RlhfRayError: data, models or rewards that cannot be used, before the first model is loaded where possible.
    """
    inputs = check_inputs(config)
    prompts = inputs.prompts
    measured = {}
    for name, model in config.models.items():
        note(f"{name}: {len(prompts[name])} prompts x {config.sampling.samples_per_prompt}, {model.path}")
        measured[name] = _measure(config, model, prompts[name], inputs.texts, inputs.red_team.get(name))
    base = config.baseline_name
    shown = tuple(map(shown_prompt, prompts[base].examples))
    answers = {name: m.answers for name, m in measured.items()}
    metrics = {name: model_metrics(config, m) for name, m in measured.items()}
    alarms = _perplexity_rises(config, measured, metrics)
    result = {
        "name": config.name,
        "seed": config.seed,
        "baseline": base,
        "prompts": len(shown),
        "samples_per_prompt": config.sampling.samples_per_prompt,
        "dropped": {name: p.dropped for name, p in prompts.items()},
        "models": {
            name: {"path": model.path, "metrics": metrics[name]} for name, model in config.models.items()
        },
        "win_rate": _win_rates(config, shown, answers, note),
        "alarms": alarms,
        "samples": side_by_side(shown[: config.samples], answers),
    }
    return Comparison(result, shown, answers)


def check_inputs(config: EvalRunConfig) -> Inputs:
    """All that people get wrong, read before a model is loaded. Raises RlhfRayError."""
    require(needs_of(config))
    _check_names(config, check_rewards(config))
    tokenizers = {name: tokenizer_of(model) for name, model in config.models.items()}

    def read(data: PromptsConfig) -> dict[str, PromptSet]:
        return common_prompts({name: read_prompts(data, t, config.clock) for name, t in tokenizers.items()})

    texts = _perplexity_texts(config)
    prompts, red_team = read(config.data), read(config.red_team) if config.red_team else {}
    for name, model in config.models.items():
        asked = [tokens for sets in (prompts, red_team) if sets for tokens in sets[name].token_ids]
        check_fits(model, config, tokenizers[name], asked)
    return Inputs(prompts, red_team, texts)


def _check_names(config: EvalRunConfig, rewards: Sequence[str]) -> None:
    by, right = config.win_rate.by, config.pass_at.reward
    if by not in ("auto", "judge", "reward", *rewards):
        raise ConfigError(f"win_rate.by={by} is none of judge, reward, {', '.join(rewards)}; choose one of these")
    if right is not None and right not in rewards:
        raise ConfigError(f"pass_at.reward={right} is none of the rewards; choose one of {', '.join(rewards)}")


def _perplexity_texts(config: EvalRunConfig) -> list[str]:
    settings = config.perplexity
    if settings is None:
        return []
    return load_texts(settings.path, field=settings.field, split=settings.split)[: settings.limit]


def _measure(
    config: EvalRunConfig,
    settings: SampledModelConfig,
    prompts: PromptSet,
    texts: Sequence[str],
    red_team: PromptSet | None,
) -> Measured:
    perplexity, harmful = None, None
    with open_model(settings, config) as model:
        batch = model.sample(prompts, config.sampling, config.seed)
        if config.perplexity is not None:
            perplexity = _perplexity(config.perplexity, model, texts)
        if red_team is not None:
            one_each = config.sampling.model_copy(update={"samples_per_prompt": 1})
            red_batch = model.sample(red_team, one_each, config.seed)
    answers = model.score(batch, prompts)
    if red_team is not None:
        harmful = model.score(red_batch, red_team, [config.red_team.safety])
    return Measured(answers, perplexity, harmful)


def _perplexity(settings: PerplexityConfig, model: AnsweringModel, texts: Sequence[str]) -> Perplexity:
    token_ids = model.tokenizer(list(texts))["input_ids"]
    window = min(settings.window, model.longest_window)
    return measure_perplexity(model.generator.logprobs, texts, token_ids, window=window)


def model_metrics(config: EvalRunConfig, measured: Measured) -> dict[str, float]:
    """All numbers of one model, by the names that training uses where it has them."""
    answers = measured.answers
    metrics: dict[str, float] = {}
    if config.has_reward:
        metrics |= reward_metrics(
            answers.scores.score, answers.scores.by_function, right=_right_by(config),
            right_at=config.pass_at.right_at,
        )  # fmt: skip
        metrics["reward_std"] = _std(answers.scores.score)
        by_function = answers.scores.by_function
        judging = [name for name, value_B in by_function.items() if not value_B.isnan().all()]
        metrics |= {f"reward_std/{name}": _std(by_function[name]) for name in judging}
        metrics |= _pass_at_k(config, answers)
    ids = answers.scores.completion_ids
    metrics |= text_metrics(answers.completions, ids, answers.rows, largest_n=3, chinese=config.chinese)
    metrics["response_len_max"] = float(answers.rows.response_lengths.max())
    bleu = self_bleu(answers.completions, config.self_bleu_texts, chinese=config.chinese)
    if bleu is not None:
        metrics["self_bleu"] = bleu
    if measured.perplexity is not None:
        metrics["perplexity"] = measured.perplexity.per_token
        metrics["bits_per_byte"] = measured.perplexity.bits_per_byte
    if measured.red_team is not None:
        metrics["harmful_rate"] = harmful_rate(config.red_team, measured.red_team)
    return metrics


def _std(value_B: Any) -> float:
    scored_B = value_B[~value_B.isnan()]
    return float(scored_B.std(correction=0)) if len(scored_B) else float("nan")


def _right_by(config: EvalRunConfig) -> str | None:
    return config.pass_at.reward or right_by(config.rewards)


def _pass_at_k(config: EvalRunConfig, answers: Answers) -> dict[str, float]:
    by_function = answers.scores.by_function
    name = _right_by(config)
    if name not in by_function:
        return {}
    # A prompt of whose answers none has a score is not this function's to judge; else no score means: not right.
    prompts = [scores for scores in answers.by_prompt(by_function[name].tolist()) if not all(map(math.isnan, scores))]
    right = [[score >= config.pass_at.right_at for score in scores] for scores in prompts]
    return {f"pass@{k}": mean_pass_at_k(right, k) for k in config.pass_at.k} if right else {}


def harmful_rate(settings: RedTeamConfig, answers: Answers) -> float:
    """Share of the answers that the safety reward scores below `harmful_below`; those without a score do not count."""
    score_B = answers.scores.score[~answers.scores.score.isnan()]
    return float((score_B < settings.harmful_below).float().mean())


def _perplexity_rises(
    config: EvalRunConfig, measured: Mapping[str, Measured], metrics: Mapping[str, dict[str, float]]
) -> list[str]:
    """Adds `perplexity_rise` (a share) to each model but the baseline; returns what is alarming about it.

    Perplexity a token needs one tokenizer; where two models cut the texts differently, bits a byte are compared.
    """
    base = measured[config.baseline_name].perplexity
    alarms = []
    for name, result in measured.items():
        if base is None or name == config.baseline_name:
            continue
        same = result.perplexity.tokens == base.tokens
        measure = "per_token" if same else "bits_per_byte"
        rise = getattr(result.perplexity, measure) / getattr(base, measure) - 1
        metrics[name]["perplexity_rise"] = rise
        if rise > config.perplexity.alarm_rise:
            what = "perplexity" if same else "bits per byte (their tokenizers differ)"
            alarms.append(
                f"{name}: {what} on {config.perplexity.path} is {rise:.0%} above that of {config.baseline_name} (limit "
                f"{config.perplexity.alarm_rise:.0%}): it forgets the language; raise the KL coefficient, mix plain "
                "text into SFT, or take an earlier checkpoint"
            )
    return alarms


def _win_rates(
    config: EvalRunConfig, prompts: Sequence[str], answers: Mapping[str, Answers], note: Note
) -> dict[str, dict[str, Any]]:
    """Each model but the baseline against it."""
    by, base = _judged_by(config), answers[config.baseline_name]
    rates = {}
    for name, ours in answers.items():
        if by is None or name == config.baseline_name:
            continue
        details: dict[str, Any] = {"by": by}
        if by == "judge":
            note(f"{name}: judged against {config.baseline_name}, both ways round")
            outcomes, judged = _judged(config, prompts, ours, base)
            details |= judged
        else:
            same = [a == b for a, b in zip(ours.completions, base.completions, strict=True)]
            columns = ours.by_prompt(_scores(ours, by)), base.by_prompt(_scores(base, by)), ours.by_prompt(same)
            outcomes = [outcomes_of_scores(*row, config.win_rate.tie_margin) for row in zip(*columns, strict=True)]
        rate = win_rate(outcomes, confidence=config.win_rate.confidence, seed=config.seed)
        rates[name] = {**rate.as_dict(), **details}
    return rates


def _judged_by(config: EvalRunConfig) -> str | None:
    if config.win_rate.by != "auto":
        return config.win_rate.by
    if config.judge is not None:
        return "judge"
    return "reward" if config.has_reward else None


def _scores(answers: Answers, by: str) -> list[float]:
    return (answers.scores.score if by == "reward" else answers.scores.by_function[by]).tolist()


def _judged(
    config: EvalRunConfig, prompts: Sequence[str], ours: Answers, theirs: Answers
) -> tuple[list[list[int]], dict[str, Any]]:
    """(outcomes by prompt, how often the two orders contradict each other and how many pairs it could not judge)."""
    repeated = [prompt for prompt in prompts for _ in range(ours.samples)]
    verdicts = compare_both_orders(open_judge(config.judge), repeated, ours.completions, theirs.completions)
    value = {"first": 1, "second": -1, "tie": 0}
    outcomes = [[value[v.winner] for v in row if isinstance(v, Verdict)] for row in ours.by_prompt(verdicts)]
    judged = [v for v in verdicts if isinstance(v, Verdict)]
    bias = sum(v.position_bias for v in judged) / len(judged)
    return outcomes, {"order_bias_rate": bias, "unjudged": len(verdicts) - len(judged)}


def side_by_side(prompts: Sequence[str], answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """The first answer of every model to each prompt."""
    return [
        {
            "prompt": prompt,
            "answers": {
                name: {
                    "completion": given.completions[i * given.samples],
                    "reward": float(given.scores.score[i * given.samples]) if given.scores.by_function else None,
                }
                for name, given in answers.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]
