"""Answers of a model to prompts, through the same generator and reward roles as in training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.evaluation import SampledModelConfig, SampledRunConfig, SamplingConfig
from rlhf_ray.config.rewards import RewardConfig, RewardSettings
from rlhf_ray.config.schema import PromptsConfig
from rlhf_ray.data.chat import Chat, Instruction, Messages, Prompt
from rlhf_ray.data.messages import readable
from rlhf_ray.data.prompts import Example, PromptSet, load_prompts, prompt_options
from rlhf_ray.data.templates import set_chat_template
from rlhf_ray.data.turn_end import with_turn_ends
from rlhf_ray.errors import DataError
from rlhf_ray.models.devices import choose_hardware
from rlhf_ray.models.fits import limits_of, require_end, require_room, require_served, require_tokens
from rlhf_ray.models.loading import load_tokenizer, stop_token_ids
from rlhf_ray.rewards.compose import RewardSet, reward_of
from rlhf_ray.rewards.judge import open_judge
from rlhf_ray.rewards.reading import Answered
from rlhf_ray.roles.batch import Batch, Rows
from rlhf_ray.roles.factory import Assets, GeneratorUse, make_generator, make_reward
from rlhf_ray.roles.protocols import Generator, Request, Sampling, Scores
from rlhf_ray.sample import sample_seed


@dataclass(frozen=True)
class Answers:
    """One model's answers. Row `p * samples + s` is answer s to prompt p."""

    prompts: tuple[Example, ...]
    samples: int
    completions: tuple[str, ...]
    rows: Rows
    scores: Scores

    def by_prompt(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """One value a row -> one sequence a prompt."""
        return [values[i : i + self.samples] for i in range(0, len(values), self.samples)]


def requests_for(prompts: PromptSet, seed: int, samples: int = 1) -> list[Request]:
    """`samples` requests a prompt. Their seeds differ from every training seed, and are always the same: what changes
    between two evaluations, or between two models, is the model alone.
    """
    return [
        Request(
            prompt_id=index,
            sample_id=index * samples + member,
            token_ids=tokens,
            seed=sample_seed(seed, -1 - index, member),
            columns={**example.columns, "prompt": example.prompt},
            chat=example.chat,
        )
        for index, (example, tokens) in enumerate(zip(prompts.examples, prompts.token_ids, strict=True))
        for member in range(samples)
    ]


def read_prompts(data: PromptsConfig, tokenizer: PreTrainedTokenizerBase, clock: datetime | None) -> PromptSet:
    """`clock`: what a chat template takes for now."""
    return load_prompts(data.path, tokenizer, split=data.split, limit=data.limit, **prompt_options(data, clock))


def common_prompts(sets: dict[str, PromptSet]) -> dict[str, PromptSet]:
    """Each model's prompts, cut to the rows that all models can read, in the same order.

    A tokenizer of its own may make a row too long for one model only. Raises DataError if nothing is left.
    """
    rows = {name: [_identity(example) for example in prompts.examples] for name, prompts in sets.items()}
    shared = set.intersection(*map(set, rows.values()))
    if not shared:
        raise DataError(f"no prompt can be read by all of {', '.join(sets)}; raise data.max_prompt_tokens")
    result = {}
    for name, prompts in sets.items():
        kept = [i for i, row in enumerate(rows[name]) if row in shared]
        result[name] = PromptSet(
            tuple(prompts.examples[i] for i in kept), tuple(prompts.token_ids[i] for i in kept), prompts.dropped
        )
    return result


def _identity(example: Example) -> tuple[str, str]:
    """A row of instructions holds several prompts; what stands behind a model's own template is all models' row."""
    return example.where, repr(example.asked)


def shown_prompt(example: Example) -> str:
    """The prompt as people and judges read it: without a model's template."""
    return prompt_text(example.asked)


def prompt_text(asked: Prompt | Messages) -> str:
    """A prompt or an answer of any kind as one text; the role of a lone message goes without saying."""
    if isinstance(asked, str):
        return asked
    if isinstance(asked, Instruction):
        return "\n\n".join(part for part in (asked.instruction, asked.input) if part)
    messages, tools = (asked.messages, asked.tools) if isinstance(asked, Chat) else (asked, ())
    if len(messages) == 1 and not tools:
        return readable(messages[0])
    offered = [f"tools: {json.dumps(list(tools), ensure_ascii=False)}"] if tools else []
    return "\n\n".join([*offered, *(f"{message['role']}: {readable(message)}" for message in messages)])


class AnsweringModel:
    """A model with its generator; `open_model` makes one. What scores its answers needs no generator, and runs after it
    is closed: on a GPU, vLLM leaves no room for a reward model.

    Attributes:
        judging: what scores its answers.
        stop: tokens that end one.
        longest_window: tokens of a sequence whose log-probabilities the generator can give.
    """

    def __init__(
        self, generator: Generator, assets: Assets, tokenizer: PreTrainedTokenizerBase, judging: RewardSettings,
        longest_window: int | None = None,
    ) -> None:  # fmt: skip
        self.generator: Generator | None = generator
        self.assets = assets
        self.tokenizer = tokenizer
        self.judging = judging
        named = stop_token_ids(assets.policy, tokenizer, trust_remote_code=assets.trust_remote_code)
        self.stop = with_turn_ends(named, tokenizer)
        limits = limits_of(assets.policy, trust_remote_code=assets.trust_remote_code)
        self.longest_window = limits.longest(longest_window or 1 << 30)

    def sample(self, prompts: PromptSet, sampling: SamplingConfig, seed: int) -> Batch:
        """`sampling.samples_per_prompt` answers to each prompt, prompt by prompt."""
        return self.generator.generate(
            requests_for(prompts, seed, sampling.samples_per_prompt),
            Sampling(
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_token_ids=self.stop,
            ),
        )

    def score(self, batch: Batch, prompts: PromptSet, rewards: list[RewardConfig] | None = None) -> Answers:
        """The batch as texts with the run's rewards (or with those given, and no reward model)."""
        judging = self.judging if rewards is None else RewardSettings(rewards, clock=self.judging.clock)
        reward = make_reward(judging, self.assets)
        try:
            scores = reward.score(batch, texts=len(batch))
        finally:
            reward.functions.close()
        completions = tuple(completion for _, completion in scores.texts)
        return Answers(prompts.examples, len(batch) // len(prompts), completions, batch.rows, scores)

    def score_texts(
        self, prompts: Sequence[str], completions: Sequence[str], chats: Sequence[Chat | None] | None = None
    ) -> list[float]:
        """The run's reward of answers that were given, not sampled. Reward functions get no columns of the data.

        `chats`: the prompts as conversations, where they are such, for a reward model that has a chat template.
        """
        reward = make_reward(self.judging, self.assets)
        ids = self.tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        try:
            rows = zip(prompts, completions, chats or [None] * len(ids), strict=True)
            answered = [Answered(prompt, completion, chat, completion) for prompt, completion, chat in rows]
            scores = reward.score_texts(prompts, completions, ids, [{}] * len(ids), answered, range(len(ids)))
            return scores.score.tolist()
        finally:
            reward.functions.close()

    def close(self) -> None:
        """Frees the generator: the next model may need its memory, and so may whoever scores the answers."""
        self.generator.close()
        self.generator = None


@contextmanager
def open_model(model: SampledModelConfig, config: SampledRunConfig) -> Iterator[AnsweringModel]:
    """The model behind the generator role that a training run with these settings would have; closed at the end."""
    hardware = choose_hardware(model.device or config.device, model.dtype or config.dtype)
    assets = Assets(model.path, model.tokenizer or model.path, hardware, model.trust_remote_code)
    tokenizer = tokenizer_of(model)
    set_chat_template(tokenizer, config.data.chat_template)  # it says what ends a turn
    longest, spare = config.longest_sequence, config.generator.facts.spare_tokens
    generator = make_generator(config.generator, assets, GeneratorUse("in_process", longest))
    opened = AnsweringModel(generator, assets, tokenizer, config.judging, longest - spare if spare else None)
    try:
        yield opened
    finally:
        opened.close()


def check_fits(
    model: SampledModelConfig, config: SampledRunConfig, tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
) -> None:  # fmt: skip
    """Prompts that the model has room and embeddings for; and with vLLM, what it would refuse when it has started.

    Raises ConfigError, ModelError.
    """
    limits, device = limits_of(model.path, trust_remote_code=model.trust_remote_code), model.device or config.device
    require_served(
        model.path,
        config.generator,
        choose_hardware().device if device == "auto" else device,
        longest=config.longest_sequence,
        bfloat16=(model.dtype or config.dtype) == "bfloat16",
        trust_remote_code=model.trust_remote_code,
    )
    require_room(limits, max(map(len, prompts)), config.sampling.max_new_tokens, "sampling.max_new_tokens")
    require_tokens(limits, tokenizer, prompts, "the model's tokenizer")


def check_rewards(config: SampledRunConfig) -> list[str]:
    """The names of the rewards. All that people get wrong about them shows here, before anything is sampled.

    Raises RlhfRayError.
    """
    functions = RewardSet([reward_of(reward) for reward in config.rewards])
    functions.close()
    names = list(functions.functions)
    if config.reward_model is not None:
        load_tokenizer(config.reward_model.path)
        names.append("reward_model")
    if config.safety is not None:
        load_tokenizer(config.safety.path)
        names.append("safety")
    if config.judge is not None:
        open_judge(config.judge)
    return names


def tokenizer_of(model: SampledModelConfig) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model.tokenizer or model.path, trust_remote_code=model.trust_remote_code)
    require_end(tokenizer, model.tokenizer or model.path, "answer")
    return tokenizer
