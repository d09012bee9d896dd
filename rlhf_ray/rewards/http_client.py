"""A reward that a server computes (`rlhf-ray serve-reward`, or any other that speaks the same JSON)."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rlhf_ray.config.redacted import legible, redacted
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.failures import Failure, Outcome, checked, join

_TRY_AGAIN = {429, 502, 503, 504}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_LARGEST_ANSWER = 2**24  # bytes; a row takes some 25 for each function, and a failed one some 1,000
_MOST_SAID = 1000  # enough for the frames of a function that raised there


class _NotNow(Exception):
    """The server is not there, or busy: the same request may succeed later."""


class HttpReward:
    """Posts batches of rows to a server; async, so several servers and batches are asked at the same time.

    Args:
        url: of the server (`/score` is added) or of a path on it.
        token_env: environment variable with the bearer token; a token itself does not belong in a config.
        batch_size: rows in one request.
        timeout_s: for all of a batch's attempts together; a server that is away or busy is asked again until then.
        connections: requests at the same time.
    Raises:
        ConfigError: the URL or the token cannot be used.
    """

    def __init__(
        self, url: str, *, token_env: str | None = None, batch_size: int = 64, timeout_s: float = 300.0,
        connections: int = 8,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if not parts.hostname:
            raise ConfigError(f"reward {redacted(url)!r} is not a URL; give http://host:port")
        if batch_size < 1 or connections < 1:
            raise ConfigError(
                f"reward {redacted(url)}: batch_size={batch_size} and connections={connections} must be positive"
            )
        self.url = url if parts.path.strip("/") else parts._replace(path="/score").geturl()
        self.shown = redacted(self.url)
        self._token = token_from(token_env) if token_env else ""
        # Nothing compressed: a small answer must not become a large one here.
        self.headers = {"Accept-Encoding": "identity"}
        if token_env:
            self.headers["Authorization"] = f"Bearer {self._token}"
        self.batch_size, self.timeout_s, self.connections = batch_size, timeout_s, connections

    async def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Outcome:  # fmt: skip
        import aiohttp

        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        starts = range(0, len(completions), self.batch_size)
        limit = asyncio.Semaphore(self.connections)

        async def batch(start: int) -> Outcome:
            part = slice(start, start + self.batch_size)
            body = {name: values[part] for name, values in rows.items()}
            body["columns"] = {name: values[part] for name, values in columns.items()}
            async with limit:
                return await self._ask(session, body)

        forever = aiohttp.ClientTimeout(total=None)  # its own limit is five minutes; ours is timeout_s
        async with aiohttp.ClientSession(
            headers=self.headers, timeout=forever, auto_decompress=False
        ) as session:
            return join(await asyncio.gather(*map(batch, starts)))

    async def _ask(self, session: Any, body: Mapping[str, Any]) -> Outcome:
        rows, deadline, retries = len(body["completions"]), time.monotonic() + self.timeout_s, 0
        try:
            data = json.dumps(body)
        except (TypeError, ValueError) as error:
            return Outcome.failed(
                rows, f"cannot send the data's columns as JSON ({error})", "leave such columns out of the data", error
            )
        pause, why = _FIRST_PAUSE_S, "no answer"
        while True:
            try:
                left = max(0.001, deadline - time.monotonic())
                outcome = await asyncio.wait_for(self._post(session, data, rows), left)
                return Outcome(outcome.values, outcome.failures, outcome.cause, retries)
            except asyncio.TimeoutError:
                break
            except _NotNow as error:
                why = str(error)
            if time.monotonic() + pause >= deadline:
                break
            await asyncio.sleep(pause)
            pause, retries = min(2 * pause, _LONGEST_PAUSE_S), retries + 1
        failed = Outcome.failed(
            rows, f"had no scores from {self.shown} within {self.timeout_s:g} s ({why})",
            "see whether the server runs, or raise timeout_s",
        )  # fmt: skip
        return Outcome(failed.values, failed.failures, retries=retries)

    async def _post(self, session: Any, data: str, rows: int) -> Outcome:
        import aiohttp

        headers = {"Content-Type": "application/json"}
        try:
            async with session.post(self.url, data=data, headers=headers, allow_redirects=False) as response:
                status, text = response.status, await _capped(response)
                target = response.headers.get("Location", "another address")
        except aiohttp.ClientError as error:
            raise _NotNow(self._quoted(f"{type(error).__name__}: {error}")) from error
        if text is None:
            return Outcome.failed(
                rows, f"got more than {_LARGEST_ANSWER} bytes from {self.shown}", "see whether it is a reward server"
            )
        if 300 <= status < 400:
            what = f"got HTTP {status} from {self.shown}, a redirect to {self._quoted(target)}"
            return Outcome.failed(rows, what, "none is followed, for texts and token would go there; give its URL")
        if status in _TRY_AGAIN:
            raise _NotNow(f"HTTP {status}")
        if status in (401, 403):
            raise ConfigError(
                f"reward server {self.shown} refuses the token (HTTP {status}); "
                "set token_env to the name of the environment variable that holds the right one"
            )
        if status == 404:
            raise ConfigError(f"reward server {self.shown} has no such path (HTTP 404); give the URL of its scores")
        if status != 200:
            what = f"got HTTP {status} from {self.shown}: {self._quoted(_said(text))}"
            return Outcome.failed(rows, what, "see the server's log")
        return self._read(text, rows)

    def _read(self, text: str, rows: int) -> Outcome:
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, dict) or (len(scores) != 1 and "total" not in answer):
            hint = 'it must be {"scores": {name: [...]}}, with "total": [...] if there are several'
            what = f"got something else than scores from {self.shown}: {self._quoted(_said(text))}"
            return Outcome.failed(rows, what, hint)
        outcome = checked(answer["total"] if "total" in answer else next(iter(scores.values())), rows)
        return outcome.failing(self._failed_there(answer.get("failed"), rows))

    def _quoted(self, said: str) -> str:
        """Words of a server for a log: short, without what would steer a terminal, and without our own token."""
        said = legible(redacted(said[: 10 * _MOST_SAID], self._token))
        return said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]}..."

    def _failed_there(self, failed: Any, rows: int) -> dict[int, Failure]:
        """Rows that the server could not judge. A null that is not among them means: not this server's to judge."""
        reasons = {row: str(reason) for row, reason in failed} if _is_failed_list(failed) else {}
        return {
            row: Failure(f"failed at {self.shown} ({self._quoted(reason)})", "see the server's log")
            for row, reason in reasons.items()
            if row in range(rows)
        }


async def _capped(response: Any) -> str | None:
    """Its body, or None if that is larger than any answer: what comes from a network must not fill the memory."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > _LARGEST_ANSWER:
            return None
    return body.decode("utf-8", "replace")


def token_from(variable: str) -> str:
    """The bearer token in an environment variable. Raises ConfigError if there is none."""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ConfigError(f"token_env={variable}: this environment variable is not set; export it with the token")
    return token


def _is_failed_list(failed: Any) -> bool:
    """[[row, reason], ...]"""
    return isinstance(failed, list) and all(isinstance(told, list) and len(told) == 2 for told in failed)


def _said(text: str) -> str:
    """The error that a server told of, or else all of its answer."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return str(found["error"]) if isinstance(found, dict) and "error" in found else text
