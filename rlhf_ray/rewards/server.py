"""The reward server: reward functions behind HTTP, for runs on other machines or for code that needs its own machine.

`POST /score` takes `{"prompts": [...], "completions": [...], "completion_ids": [...], "columns": {name: [...]}}` and
answers `{"scores": {name: [...]}, "total": [...], "events": [...]}`. A total is null where no function judged the row,
which is then the client's to judge by another one, and where a function failed whose policy is to drop the group: such
rows stand in `"failed": [[row, reason], ...]`, too. An event tells of each function that failed or was asked again.
`GET /health` answers while the server runs. Errors answer `{"error": text}`.
"""

from __future__ import annotations

import errno
import hmac
import json
import math
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.compose import RewardSet

# A client that sends nothing for so long is not going to.
_IDLE_SECONDS = 60.0


class RewardServer:
    """Listens from the moment it is made; `serve` answers until `close`.

    Args:
        port: 0 takes a free one; `url` says which.
        token: what clients must send as `Authorization: Bearer ...`; None lets everybody in.
        max_body_mb: larger requests are refused.
    Raises:
        ConfigError: nobody can listen there.
    """

    def __init__(
        self, rewards: RewardSet, host: str = "127.0.0.1", port: int = 0, *, token: str | None = None,
        max_body_mb: float = 64.0,
    ) -> None:  # fmt: skip
        # Reward functions are written for one caller at a time.
        self._one_at_a_time = threading.Lock()
        self._rewards = rewards
        self._token = token
        self._max_bytes = int(max_body_mb * 1e6)
        try:
            self._http = _Server((host, port), self)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} of {host} is taken by another program; choose another port, or port=0 for a free one"
                ) from error
            raise ConfigError(f"cannot listen on {host} port {port} ({error.strerror}); set host and port") from error
        self.url = f"http://{host}:{self._http.server_address[1]}"

    def serve(self) -> None:
        self._http.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._rewards.close()

    def health(self) -> dict[str, Any]:
        return {"status": "ok", "rewards": list(self._rewards.functions)}

    def refuses(self, authorization: str) -> bool:
        """Compared in constant time: a token must not be guessed letter by letter."""
        return self._token is not None and not hmac.compare_digest(
            authorization.encode("utf-8", "surrogateescape"), f"Bearer {self._token}".encode()
        )

    def too_long(self, length: int) -> bool:
        return length > self._max_bytes

    def score(self, body: Any) -> dict[str, Any]:
        """Raises ValueError if it is no such request, RewardError if a function fails and its policy is to raise."""
        prompts, completions, ids, columns = _rows_in(body)
        with self._one_at_a_time:
            rewards = self._rewards.score(prompts, completions, ids, columns, others_judge=True)
        numbers = {name: _with_nulls(values) for name, values in rewards.by_function.items()}
        reasons = "; ".join(event["reason"] for event in rewards.events if event["action"] == "drop_group")
        failed = [[row, reasons] for row, total in enumerate(rewards.total) if math.isnan(total)]
        total = [
            None if not any(values[row] is not None for values in numbers.values()) else value
            for row, value in enumerate(_with_nulls(rewards.total))
        ]
        answer = {"scores": numbers, "total": total, "events": rewards.events}
        return {**answer, "failed": failed} if failed else answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Many generators' rewards may arrive in the same moment.
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], owner: RewardServer) -> None:
        self.owner = owner
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, self.server.owner.health())
        else:
            self._refuse(404, f"there is no {self.path}; POST to /score, or GET /health")

    def do_POST(self) -> None:
        owner = self.server.owner
        if owner.refuses(self.headers.get("Authorization", "")):
            return self._refuse(401, "send the server's token as `Authorization: Bearer <token>`")
        if self.path != "/score":
            return self._refuse(404, f"there is no {self.path}; POST to /score")
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            return self._refuse(411, "send a Content-Length")
        if length < 0 or owner.too_long(length):
            return self._refuse(413, f"{length} bytes are too many; send fewer rows, or raise max_body_mb")
        try:
            answer = owner.score(json.loads(self.rfile.read(length)))
        except (ValueError, RewardError) as error:  # ConfigError and JSONDecodeError are ValueErrors
            return self._answer(500 if isinstance(error, RewardError) else 400, {"error": str(error)})
        return self._answer(200, answer)

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # what is left of the body must not be read as the next request
        self._answer(status, {"error": why})

    def _answer(self, status: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing for each request: a run sends thousands."""


def _rows_in(body: Any) -> tuple[list[str], list[str], list[list[int]], list[dict[str, Any]]]:
    if not isinstance(body, dict) or not isinstance(body.get("completions"), list):
        raise ValueError('the body must be {"prompts": [...], "completions": [...], ...}')
    rows = len(body["completions"])
    given = {
        "prompts": body.get("prompts", [""] * rows),
        "completion_ids": body.get("completion_ids", [[]] * rows),
        **(body.get("columns") or {}),
    }
    for name, values in given.items():
        if not isinstance(values, list) or len(values) != rows:
            raise ValueError(f"{name} must be a list with one entry for each of the {rows} completions")
    if not all(isinstance(text, str) for text in [*body["completions"], *given["prompts"]]):
        raise ValueError("prompts and completions must be texts")
    prompts, ids = given.pop("prompts"), given.pop("completion_ids")
    return prompts, body["completions"], ids, [{n: v[i] for n, v in given.items()} for i in range(rows)]


def _with_nulls(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(value) else value for value in values]
