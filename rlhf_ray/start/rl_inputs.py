"""What an RL run reads before anything starts: its tokenizer, prompts and rows; whether all of it fits together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_ray.config.extras import needs_of, require
from rlhf_ray.config.schema import EvalConfig, RunConfig
from rlhf_ray.data.fingerprint import CHAT_TEMPLATE, fingerprint_of_template
from rlhf_ray.data.prompt_sources import load_split
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.token_rows import Bounds, joined_rows
from rlhf_ray.models.fits import limits_of, require_critic_fits, require_end, require_policy_fits, require_served
from rlhf_ray.models.loading import load_shape, load_tokenizer
from rlhf_ray.rewards.compose import reward_of
from rlhf_ray.roles.formulas import own_formulas
from rlhf_ray.rollout.order import prompt_stream
from rlhf_ray.start.sft_rows import SFTData, load_sft_data
from rlhf_ray.start.warm_start import make_tokenizer


def check_inputs(
    config: RunConfig, start: Path | None, device: str = "auto"
) -> tuple[Any, PromptSet, PromptSet, SFTData | None]:
    """(tokenizer, training prompts, held-out prompts, rows of sft_data): all that people get wrong, read before
    anything is made.

    Args:
        start: the folder that an earlier part of the run has made its tokenizer in; it need not be there.
        device: what the run computes on; auto where nobody has looked yet.

    Raises:
        RlhfRayError: a file, a row, a tokenizer or a reward that cannot be used, or a package that is not there.
    """
    require(needs_of(config))
    own_formulas(config.algorithm)
    for reward in config.rewards:
        reward_of(reward).close()
    for path in config.judging.networks:
        load_tokenizer(path)
        load_shape(path)
    tokenizer = load_tokenizer(start) if start is not None and start.is_dir() else make_tokenizer(config)
    require_end(tokenizer, config.model.tokenizer.path or config.model.path, "completion")
    train, held_out = load_data(config, tokenizer)
    prompt_stream(train, config.rollout.order, config.seed)
    prompts, new = joined_rows([train.token_ids, held_out.token_ids]), config.rollout.max_new_tokens
    path, trust = config.model.path, config.model.trust_remote_code
    require_policy_fits(limits_of(path, trust_remote_code=trust), tokenizer, prompts, new)
    require_served(
        path, config.generator, device, longest=config.longest_sequence, bfloat16=config.dtype == "bfloat16",
        trust_remote_code=trust,
    )  # fmt: skip
    if config.uses_critic and config.critic.path is not None:
        critic = limits_of(config.critic.path, trust_remote_code=trust)
        require_critic_fits(critic, tokenizer, Bounds.of(prompts).longest, new)
    sft = config.sft_data and load_sft_data(
        config.sft_data, config.model, tokenizer, seed=config.seed, clock=config.clock
    )
    return tokenizer, train, held_out, sft


def load_data(config: RunConfig, tokenizer: Any) -> tuple[PromptSet, PromptSet]:
    """(training prompts, held-out prompts). Of one file other rows each; a prompt that has two rows may be in both."""
    references = config.rollout.reference_field if config.rollout.reference_answers else None
    return load_split(
        config.data, tokenizer, clock=config.clock, asked=config.eval.size, reference_field=references
    )


def sources_of(
    evaluation: EvalConfig, train_prompts: PromptSet, held_out: PromptSet, tokenizer: Any
) -> dict[str, str]:
    """Fingerprints of all the rows that the run reads, by source, and of the template that makes them prompts."""
    found = {CHAT_TEMPLATE: fingerprint_of_template(tokenizer.chat_template)}
    found |= {prompts.label: prompts.read for prompts in train_prompts.sets}
    # Held-out rows of a file of their own are read as far as they are asked for.
    more = {prompts.label: prompts.read for prompts in held_out.sets if prompts.label not in found}
    return {**found, **{f"{label}, the first {evaluation.size}": read for label, read in more.items()}}


def left_out(train_prompts: PromptSet, held_out: PromptSet) -> list[str]:
    """A line for each source of prompts some of whose rows are not used: how many, and why."""
    # Held-out prompts that are a part of the same rows are counted with them.
    by_label = {prompts.label: prompts for prompts in (*held_out.sets, *train_prompts.sets)}
    labels = dict.fromkeys(prompts.label for prompts in (*train_prompts.sets, *held_out.sets))
    lines = ((label, by_label[label].left_out) for label in labels)
    return [f"{label}: prompts left out: {what}" for label, what in lines if what]
