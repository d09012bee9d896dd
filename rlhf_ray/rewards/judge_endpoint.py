"""A judge behind an OpenAI-compatible endpoint: vLLM's own server, or any other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.failures import Failure
from rlhf_ray.rewards.judge_questions import (
    SCORE_REMINDER,
    VERDICT_REMINDER,
    Message,
    Opinion,
    UnreadableReply,
    pair_messages,
    parse_score,
    parse_verdict,
    score_messages,
)

Read = TypeVar("Read")


class EndpointJudge:
    """Asks with at most `concurrency` requests under way. The client repeats refused and broken ones with back-off."""

    def __init__(self, config: JudgeConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                f"judge.endpoint needs the openai package, which cannot be imported ({error}); install it with "
                "`pip install 'rlhf-ray[judge]'`, or leave judge.endpoint empty for a local judge"
            ) from error
        self.config = config
        self.openai = openai
        self.key = _key(config)

    async def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float | Failure]:
        low, high = self.config.scale
        asked = [score_messages(self.config, p, c) for p, c in zip(prompts, completions, strict=True)]
        return await self._ask_all(
            asked, lambda reply: parse_score(reply, self.config.scale), SCORE_REMINDER.format(low=low, high=high)
        )

    async def compare(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[Opinion | Failure]:
        asked = [pair_messages(self.config, *row) for row in zip(prompts, a, b, strict=True)]
        return await self._ask_all(asked, lambda reply: Opinion(parse_verdict(reply)), VERDICT_REMINDER)

    async def _ask_all(
        self, asked: Sequence[list[Message]], read: Callable[[str], Read], reminder: str
    ) -> list[Read | Failure]:
        # A client belongs to one event loop, and each call of a reward function has a loop of its own.
        client = self.openai.AsyncOpenAI(
            base_url=self.config.endpoint,
            api_key=self.key,
            timeout=self.config.timeout_s,
            max_retries=self.config.retries,
        )
        gate = asyncio.Semaphore(self.config.concurrency)

        async def one(messages: list[Message]) -> Read | Failure:
            async with gate:
                return await self._ask(client, messages, read, reminder)

        async with client:
            return await _all_or_first_error([one(messages) for messages in asked])

    async def _ask(
        self, client: Any, messages: list[Message], read: Callable[[str], Read], reminder: str
    ) -> Read | Failure:
        """Asks again, reminding it of the form, until the reply can be read."""
        dialogue, why = list(messages), ""
        for _ in range(self.config.attempts):
            reply = await self._reply(client, dialogue)
            if isinstance(reply, Failure):
                return reply
            try:
                return read(reply)
            except UnreadableReply as error:
                why = f"{error}; it was {reply[-200:]!r}"
            # An empty turn of the assistant is refused by some servers.
            turn = [{"role": "assistant", "content": reply}, {"role": "user", "content": reminder}]
            dialogue = [*messages, *(turn if reply.strip() else [])]
        return Failure(
            f"got no readable reply in {self.config.attempts} attempts ({why})",
            "use a stronger judge, raise its max_tokens if the reply was cut off, or raise its attempts",
        )

    async def _reply(self, client: Any, messages: list[Message]) -> str | Failure:
        """Its text. A request that the server calls bad (a prompt that is too long, say) fails alone."""
        config, where = self.config, f"judge {self.config.model} at {self.config.endpoint}"
        try:
            answer = await client.chat.completions.create(
                model=config.model,
                messages=messages,
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                seed=config.seed,
            )
        except self.openai.BadRequestError as error:
            return Failure(f"was refused by the judge ({_first_line(error)})", "shorten the answers, or see its log")
        except self.openai.APIStatusError as error:
            raise RewardError(
                f"{where} refuses with status {error.status_code}: {_first_line(error)}; check judge.model, "
                "judge.endpoint and judge.api_key_env, and the server's own log"
            ) from error
        except self.openai.OpenAIError as error:
            raise RewardError(
                f"{where} did not answer in {config.retries + 1} attempts ({type(error).__name__}: "
                f"{_first_line(error)}); is the server up? Else raise judge.timeout_s or lower judge.concurrency"
            ) from error
        if not getattr(answer, "choices", None):
            raise RewardError(f"{where} answers without a choice; is it an OpenAI-compatible chat endpoint?")
        return answer.choices[0].message.content or ""


def _key(config: JudgeConfig) -> str:
    if config.api_key_env is None:
        return "none"  # the client insists on one; a server that needs none does not look
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"judge.api_key_env={config.api_key_env}: this environment variable is not set; export it, or leave "
            "api_key_env empty for a server without keys"
        )
    return key


async def _all_or_first_error(waiting: Sequence[Awaitable[Read]]) -> list[Read]:
    """In order. After an error nothing more is asked: a judge that refuses one key refuses a thousand times."""
    tasks = [asyncio.ensure_future(each) for each in waiting]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]
