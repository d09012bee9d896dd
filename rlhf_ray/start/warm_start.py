"""The policy a run starts from: a folder as it is, or one that is built (and taught a little) first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config.given import Given
from rlhf_ray.config.schema import DataConfig, RunConfig, WarmStartConfig
from rlhf_ray.config.sections import ModelConfig
from rlhf_ray.data.cleaning import explain_unused
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.prompt_rows import first_words
from rlhf_ray.data.prompt_sources import held_out_counts, load_split
from rlhf_ray.data.prompts import PromptSet, load_texts, located_texts, vocabulary_texts
from rlhf_ray.data.stream import Part
from rlhf_ray.data.tasks import is_task, load_task, supervised_pairs
from rlhf_ray.data.templates import set_chat_template
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.loops.supervised import Batches, warm_up
from rlhf_ray.models.devices import Hardware, release_memory
from rlhf_ray.models.engine import build_engine
from rlhf_ray.models.folders import save_folder
from rlhf_ray.models.loading import load_policy
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.roles.objectives import SFT
from rlhf_ray.roles.supervised import SupervisedTrainer
from rlhf_ray.run.storage import written_whole
from rlhf_ray.start.supervised_inputs import corpus
from rlhf_ray.start.tokenizer import open_tokenizer

OnStep = Callable[[int, float], None]
Note = Callable[[str], None]
Tokens = tuple[int, ...]


def ignored(line: str) -> None:
    """Of notes nobody wants."""


def starting_policy(
    config: RunConfig, folder: Path, hardware: Hardware, on_step: OnStep, note: Note = ignored
) -> tuple[str, str]:
    """(policy, tokenizer): paths for every role to load. Writes `folder` only if something has to be made.

    `on_step` gets the step and loss of a warm start, `note` what is to be said of its rows.

    A finished `folder` is used again, so a resumed run starts from the same weights.
    """
    scratch = config.model.path.startswith("scratch:")
    made = scratch or config.warm_start.steps > 0 or isinstance(config.model.path, Given)
    if not made and config.data.chat_template is None and not isinstance(config.model.tokenizer.path, Given):
        return config.model.path, config.model.tokenizer.path or config.model.path
    if not folder.is_dir():
        tokenizer = make_tokenizer(config)
        if made:
            model = make_model(config.model, config.seed, tokenizer) if scratch else load_policy(
                config.model.path, trust_remote_code=config.model.trust_remote_code
            )
            if config.warm_start.steps:
                lessons = warm_start_lessons(config.data, config.warm_start, tokenizer, config.clock)
                if lessons.unused:
                    note(f"warm start: {explain_unused(lessons.unused)}")
                model = warm_start(
                    config.warm_start, lessons, model, tokenizer, hardware, on_step, seed=config.seed,
                    tokens_per_microbatch=config.learner.tokens_per_microbatch,
                )  # fmt: skip
            release_memory()  # its workers may need this GPU
        with written_whole("the policy to start from", folder) as unfinished:
            save_folder(unfinished, model if made else None, tokenizer)
    return str(folder) if made else config.model.path, str(folder)


def make_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one learned from the data; with the chat template that the data asks for."""

    def texts() -> list[str]:
        more = [] if config.sft_data is None else corpus(config.sft_data)
        return training_texts(config.data, config.warm_start.completion) + more

    tokenizer = open_tokenizer(config.model, texts, config.data.paths)
    set_chat_template(tokenizer, config.data.chat_template)
    return tokenizer


def training_texts(data: DataConfig, completion: str | None) -> list[str]:
    """The sources' whole texts, for a tokenizer: without those at the end, of which most are held out for evaluation.

    Exactly which are cannot be said before there is a tokenizer: prompts may be dropped for their length.
    """
    texts = [_texts_of(part.data, completion) for part in data.parts]
    try:
        held_out = held_out_counts(data, list(map(len, texts)))
    except ConfigError:
        held_out = [0] * len(texts)  # too few rows, which is said where the prompts are read
    return [text for own, count in zip(texts, held_out, strict=True) for text in own[: len(own) - count]]


def _texts_of(data: DataConfig, completion: str | None) -> list[str]:
    """Of one source; of a task its alphabet."""
    if is_task(data.path):
        return [load_task(data.path).alphabet]
    texts = vocabulary_texts(data.path, field=data.field, split=data.split)
    if completion is not None:
        answers = load_texts(data.path, field=completion, split=data.split)
        texts = [f"{text}\n{answer}" for text, answer in zip(texts, answers, strict=True)]
    if data.prompt_words is not None:
        texts = [text for text in texts if first_words(text, data.prompt_words) is not None]
    return texts[: data.limit]


def make_model(model: ModelConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_scratch(
        model.path.removeprefix("scratch:"),
        vocab_size=len(tokenizer),
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **model.scratch.model_dump(),
    )


@dataclass(frozen=True)
class Lessons:
    """What a warm start learns, source after source; `unused` counts rows by column or key that it does not read."""

    examples: tuple[TokenizedExample, ...]
    parts: tuple[Part, ...]
    unused: Mapping[str, int]


def warm_start(
    settings: WarmStartConfig, lessons: Lessons, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    hardware: Hardware, on_step: OnStep, *, seed: int, tokens_per_microbatch: int,
) -> PreTrainedModel:  # fmt: skip
    """Supervised steps on the training data; sources are drawn by weight."""
    trainer = SupervisedTrainer(
        build_engine("torch", model, device=hardware.device, dtype=hardware.dtype),
        SFT.of(tokenizer),
        {"train": lessons.examples},
        tokens_per_microbatch=tokens_per_microbatch,
        tokenizer=tokenizer,
    )
    warm_up(
        trainer,
        Batches(len(lessons.examples), settings.batch_size, seed, parts=lessons.parts),
        steps=settings.steps,
        lr=settings.lr,
        target_accuracy=settings.target_accuracy,
        on_step=on_step,
    )
    return model.cpu()


def warm_start_lessons(
    data: DataConfig, settings: WarmStartConfig, tokenizer: PreTrainedTokenizerBase, clock: datetime | None
) -> Lessons:
    """Answers to learn after their prompts (a task's own), or whole texts; EOS ends each that is not cut at the limit.

    `clock`: what a chat template takes for now. Raises DataError for a source none of whose prompts leaves room for an
    answer.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    limit, eos, completion = settings.max_length, [tokenizer.eos_token_id], settings.completion
    sources, unused = data.parts, Counter[str]()
    train = held_out = None
    if not all(is_task(source.data.path) for source in sources):
        train, held_out = load_split(data, tokenizer, clock=clock, reference_field=completion)
    examples: list[TokenizedExample] = []
    parts: list[Part] = []
    for number, source in enumerate(sources):
        path = source.data.path
        if is_task(path):
            pairs = [(encode(p.prompt), encode(p.completion) + eos) for p in supervised_pairs(path)]
        elif completion is not None:
            pairs = _answered_prompts(train.sets[number])
        else:
            texts = _texts_of_training_rows(source.data, train.sets[number], held_out, unused)
            pairs = [([], encode(text) + eos) for text in texts]
        # A prompt that fills the limit leaves nothing to learn.
        own = [_example(prompt, answer[: limit - len(prompt)]) for prompt, answer in pairs if len(prompt) < limit]
        if not own:
            raise DataError(
                f"{path}: no prompt is shorter than warm_start.max_length={limit} tokens, so there is no answer to "
                "learn; raise it"
            )
        examples += own
        parts.append(Part(source.name, len(own), source.weight))
    return Lessons(tuple(examples), tuple(parts), unused)


def _example(prompt: Sequence[int], completion: Sequence[int]) -> TokenizedExample:
    return TokenizedExample((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion))


def _texts_of_training_rows(
    data: DataConfig, train: PromptSet, held_out: PromptSet, unused: Counter[str]
) -> list[str]:
    """The whole texts of the rows whose prompts are learned from: none that evaluation will ask about."""
    wanted = {example.where for example in train.examples} - {example.where for example in held_out.examples}
    rows = located_texts(data.path, field=data.field, split=data.split, unused=unused)
    return [text for where, text in rows if where in wanted]


def _answered_prompts(train: PromptSet) -> list[tuple[Tokens, Tokens]]:
    """The training prompts, with the very tokens that the generator will get, and the answers in their rows."""
    return [(ids, answer) for ids, answers in zip(train.token_ids, train.answers, strict=True) for answer in answers]
