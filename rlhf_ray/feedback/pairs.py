"""`rlhf-ray pairs`: a model answers prompts, a judge or a reward says which answer is better; for `rm` and `dpo`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config.extras import AGREEMENT, needs_of, require
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.load import dump_config
from rlhf_ray.data.chat import Chat, Instruction
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.prompts import Example, PromptSet, prompt_encoder
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.tasks import is_task
from rlhf_ray.data.types import PreferenceRow, detect, parse
from rlhf_ray.data.values import EmptyRowError
from rlhf_ray.errors import DataError
from rlhf_ray.evaluation.answers import (
    AnsweringModel,
    Answers,
    check_fits,
    check_rewards,
    open_model,
    prompt_text,
    read_prompts,
    shown_prompt,
    tokenizer_of,
)
from rlhf_ray.feedback.labelling import (
    Candidate,
    Label,
    agreement,
    candidates_of,
    label_by_judge,
    label_by_score,
    order_bias,
)
from rlhf_ray.rewards.judge import open_judge
from rlhf_ray.run.directory import RunDirectory, ended_by
from rlhf_ray.run.resume import frozen_clock
from rlhf_ray.run.storage import to_json, write_atomically

Note = Callable[[str], None]


@dataclass(frozen=True)
class HumanPair:
    """One row of the data that says what people prefer, as texts; `chat`: its prompt with what the settings give it,
    where it is a conversation whose answers are one message each."""

    prompt: str
    chosen: str
    rejected: str
    chat: Chat | None = None


def run_pairs(
    config: PairsConfig, run_dir: str | Path | None = None, note: Note = lambda line: None
) -> dict[str, Any]:
    """Samples, labels and writes pairs.jsonl and pairs.json (what was done, and how far the labels can be trusted).

    Returns what pairs.json holds, with `run_dir`. Raises RlhfRayError; DataError if no pair is left.
    """
    directory = RunDirectory.open(config.name, run_dir)
    config = frozen_clock(config, directory)
    directory.write_config(dump_config(config))
    started = time.monotonic()
    summary: dict[str, Any] = {"name": config.name, "run_dir": str(directory.path), "steps": 0}
    try:
        rows, result = make_pairs(config, note)
        # The report first: where no pair is left, it says why.
        write_atomically(directory.path / "pairs.json", to_json(result, indent=1))
        if not rows:
            raise DataError(
                f"no pair is left: {result['dropped']}; sample more answers, raise sampling.temperature, or let "
                "somebody label who sees a difference"
            )
        write_atomically(directory.path / "pairs.jsonl", "".join(to_json(row) + "\n" for row in rows))
    except BaseException as error:
        directory.write_summary({**summary, **ended_by(error)})
        raise
    seconds = round(time.monotonic() - started, 3)
    directory.write_summary({**summary, "status": "finished", "seconds": seconds, **result})
    return {**result, "run_dir": str(directory.path)}


def make_pairs(config: PairsConfig, note: Note = lambda line: None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows of pairs.jsonl, pairs.json)."""
    names, prompts, human = check_inputs(config)
    with open_model(config.model, config) as model:
        note(f"{len(prompts)} prompts x {config.sampling.samples_per_prompt} answers, {config.model.path}")
        batch = model.sample(prompts, config.sampling, config.seed)
    answers = model.score(batch, prompts)
    candidates = candidates_of(config.pairing, answers.samples, answers.scores.score.tolist(), len(prompts))
    different = [c for c in candidates if answers.completions[c.first] != answers.completions[c.second]]
    note(f"labelling {len(different)} pairs" + (f", and {len(human)} of people" if human else ""))
    labels = _labels(config, answers, different)
    human_labels = _human_labels(config, model, human)
    kept = [(c, label) for c, label in zip(different, labels, strict=True) if label.winner in ("first", "second")]
    counts = Counter(label.winner for label in labels)
    lineage = _lineage(config, names)
    rows = [_row(config, answers, candidate, label, lineage) for candidate, label in kept]
    result = {
        **lineage,
        "sampling": config.sampling.model_dump(),
        "prompts": len(prompts),
        "answers": len(answers.completions),
        "compared": len(candidates),
        "pairs": len(rows),
        "dropped": {
            "same_text": len(candidates) - len(different),
            "tie": counts["tie"],
            "unjudged": counts["none"],
        },
        "dropped_prompts": prompts.dropped,
        **order_bias(labels),
        **({"human": agreement(human_labels)} if human else {}),
    }
    return rows, result


def check_inputs(config: PairsConfig) -> tuple[list[str], PromptSet, list[HumanPair]]:
    """(names of the rewards, prompts, people's pairs): all that people get wrong, read before a model is loaded.

    Raises RlhfRayError.
    """
    require(needs_of(config))
    names = check_rewards(config)
    tokenizer = tokenizer_of(config.model)
    prompts = read_prompts(config.data, tokenizer, config.clock)
    human = human_pairs(config, prompt_encoder(config.data, tokenizer, config.clock))
    require([AGREEMENT] if human else [])
    check_fits(config.model, config, tokenizer, prompts.token_ids)
    return names, prompts, human


def describe(result: dict[str, Any]) -> str:
    """What was done, in a few lines for people."""
    dropped = ", ".join(f"{count} {why}" for why, count in result["dropped"].items() if count) or "none"
    lines = [
        f"{result['pairs']} pairs of {result['answers']} answers to {result['prompts']} prompts, labelled by "
        f"{result['labeller']}; of {result['compared']} compared, dropped: {dropped}"
    ]
    if "order_bias_rate" in result:
        first = result.get("named_first_rate")
        place = "" if first is None else f"; it names what stands first in {first:.1%} of its verdicts"
        lines.append(f"order bias: the judge contradicts itself in {result['order_bias_rate']:.1%} of the pairs{place}")
    if "human" in result:
        human = result["human"]
        rate = "undecided" if human["agreement"] is None else (
            f"{human['agreement']:.1%} [{human['low']:.1%}, {human['high']:.1%}]"
        )
        lines.append(
            f"agreement with people: {rate} ({human['agreed']} agreed, {human['disagreed']} disagreed, "
            f"{human['ties']} ties, {human['unjudged']} not judged)"
        )
    return "\n".join(lines)


def human_pairs(config: PairsConfig, encoder: Encoder | None = None) -> list[HumanPair]:
    """The first pairs of the data, where its rows say what people prefer; else none. Empty answers are left out.

    `encoder`: how prompts of the data are read, so that a reward model reads these as it reads the sampled ones.
    """
    if config.human_pairs == 0 or is_task(config.data.path):
        return []
    pairs: list[HumanPair] = []
    for row in read_rows(config.data.path, split=config.data.split):
        if len(pairs) == config.human_pairs or not {"chosen", "rejected"} <= set(row.fields):
            break
        with suppress(EmptyRowError):
            records = [record for record in parse(row, detect(row)) if isinstance(record, PreferenceRow)]
            pairs += [_human_pair(record, encoder) for record in records]
    return pairs


def _human_pair(row: PreferenceRow, encoder: Encoder | None) -> HumanPair:
    single = all(isinstance(answer, str) or len(answer) == 1 for answer in (row.chosen, row.rejected))
    chat = encoder.chat_of(row.prompt) if encoder is not None and single else None
    return HumanPair(*map(prompt_text, (row.prompt, row.chosen, row.rejected)), chat)


def _labels(config: PairsConfig, answers: Answers, candidates: Sequence[Candidate]) -> list[Label]:
    first, second = [c.first for c in candidates], [c.second for c in candidates]
    if not config.labelled_by_judge:
        scores = answers.scores.score.tolist()
        return label_by_score([scores[i] for i in first], [scores[i] for i in second], config.min_margin)
    prompts = [shown_prompt(answers.prompts[c.prompt]) for c in candidates]
    texts = answers.completions
    return label_by_judge(open_judge(config.judge), prompts, [texts[i] for i in first], [texts[i] for i in second])


def _human_labels(config: PairsConfig, model: AnsweringModel, pairs: Sequence[HumanPair]) -> list[Label]:
    """What the labeller says of people's pairs; theirs is always the first."""
    prompts, chosen, rejected = ([getattr(p, name) for p in pairs] for name in ("prompt", "chosen", "rejected"))
    if not pairs:
        return []
    if config.labelled_by_judge:
        return label_by_judge(open_judge(config.judge), prompts, chosen, rejected)
    chats = [pair.chat for pair in pairs]
    first, second = (model.score_texts(prompts, answers, chats) for answers in (chosen, rejected))
    return label_by_score(first, second, config.min_margin)


def _lineage(config: PairsConfig, rewards: Sequence[str]) -> dict[str, Any]:
    """Where the pairs come from."""
    labeller = f"judge:{config.judge.model}" if config.labelled_by_judge else f"reward:{'+'.join(rewards)}"
    return {"model": config.model.path, "labeller": labeller, "data": config.data.path, "seed": config.seed}


def _row(
    config: PairsConfig, answers: Answers, candidate: Candidate, label: Label, lineage: dict[str, Any]
) -> dict[str, Any]:
    """One line of pairs.jsonl: a preference row as data/types.py reads it, with its lineage."""
    example = answers.prompts[candidate.prompt]
    order = (candidate.first, candidate.second) if label.winner == "first" else (candidate.second, candidate.first)
    chosen, rejected = (answers.completions[row] for row in order)
    row: dict[str, Any] = {**_prompt_fields(example), "chosen": chosen, "rejected": rejected}
    if label.margin is not None:
        # `margin` is in units of a reward, and `rm` demands it of its own scores; nats of a judge are none.
        row["judge_margin" if config.labelled_by_judge else "margin"] = label.margin
    return {**row, "source": example.where, **lineage}


def _prompt_fields(example: Example) -> dict[str, Any]:
    """A conversation stays one, with its tools, so that the template is written once, by whoever learns from it."""
    asked = example.asked
    if isinstance(asked, Instruction):
        return {"prompt": example.prompt}
    if isinstance(asked, str):
        return {"prompt": asked}
    fields: dict[str, Any] = {"prompt": list(asked.messages)}
    if asked.tools:
        fields["tools"] = list(asked.tools)
    if asked.template_args:
        fields["chat_template_kwargs"] = dict(asked.template_args)
    return fields
