"""A judge behind an OpenAI-compatible endpoint: vLLM's own server, or any other."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.config.redacted import legible, redacted
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
_LARGEST_ANSWER = 2**24  # bytes of one reply; max_tokens tokens take a few thousand
_MOST_SAID = 300


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
            default_headers={"Accept-Encoding": "identity"},
            http_client=self.openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [_cap]}
            ),
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
        config, where = self.config, f"judge {self.config.model} at {redacted(str(self.config.endpoint))}"
        try:
            answer = await client.chat.completions.create(
                model=config.model,
                messages=messages,
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                seed=config.seed,
            )
        except self.openai.BadRequestError as error:
            return Failure(f"was refused by the judge ({self._quoted(error)})", "shorten the answers, or see its log")
        except self.openai.APIStatusError as error:
            if 300 <= error.status_code < 400:
                target = legible(redacted(error.response.headers.get("Location", "another address")))
                raise RewardError(
                    f"{where} redirects (status {error.status_code}) to {target}; none is followed, for texts and "
                    "key would go there; set judge.endpoint to that address if it is right"
                ) from None
            raise RewardError(
                f"{where} refuses with status {error.status_code}: {self._quoted(error)}; check judge.model, "
                "judge.endpoint and judge.api_key_env, and the server's own log"
            ) from error
        except self.openai.OpenAIError as error:
            if isinstance(error.__cause__, RewardError):
                raise error.__cause__ from None
            raise RewardError(
                f"{where} did not answer in {config.retries + 1} attempts ({type(error).__name__}: "
                f"{self._quoted(error)}); is the server up? Else raise judge.timeout_s or lower judge.concurrency"
            ) from error
        if not getattr(answer, "choices", None):
            raise RewardError(f"{where} answers without a choice; is it an OpenAI-compatible chat endpoint?")
        return answer.choices[0].message.content or ""

    def _quoted(self, error: Exception) -> str:
        """What it says, for a log: one line, without what would steer a terminal, and without our own key."""
        said = (str(error).strip() or type(error).__name__).split("\n")[0]
        key = "" if self.config.api_key_env is None else self.key
        return legible(redacted(said[: 10 * _MOST_SAID], key))[:_MOST_SAID]


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


async def _cap(response: Any) -> None:
    """Before its body is read: what comes from a network must not fill the memory."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RewardError(
            "the judge's endpoint compresses its answers, though it is asked not to; switch that off there"
        )
    library = importlib.import_module(type(response).__module__.partition(".")[0])  # httpx, or what openai has instead

    class Capped(library.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            read = 0
            async for piece in self.stream:
                read += len(piece)
                if read > _LARGEST_ANSWER:
                    raise RewardError(
                        f"the judge's endpoint answers with more than {_LARGEST_ANSWER} bytes; is it a chat endpoint?"
                    )
                yield piece

        async def aclose(self) -> None:
            await self.stream.aclose()

    response.stream = Capped(response.stream)
