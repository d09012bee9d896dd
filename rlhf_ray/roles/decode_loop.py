"""Writes answers token by token: rows leave when they end, waiting ones join, and weights change between two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ray.errors import DataError
from rlhf_ray.roles.decode_forward import PromptPass
from rlhf_ray.roles.kv_memory import KVMemory, fits_architecture
from rlhf_ray.roles.own_cache import OwnCache
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.roles.sampler import draw, keyed_uniform, seeds_of
from rlhf_ray.sample import Sample

_AHEAD = 32  # steps whose random numbers are drawn together
# Rows join where there is room for an eighth of those that are being written: each join is a pass of its own.
_WORTH = 8

OnTokens = Callable[[Sequence[int]], None]


@dataclass(eq=False)
class Row:
    """A request, and what has been written of its answer."""

    request: Request
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def prefix(self) -> tuple[int, ...]:
        return (*self.request.token_ids, *self.tokens)

    @property
    def final(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return len(self.request.token_ids) + self.sampling.max_new_tokens

    @property
    def temperature(self) -> float:
        own = self.request.temperature
        return self.sampling.temperature if own is None else own

    def sample(self, ended: str) -> Sample:
        asked = self.request
        return Sample.answer(
            asked.prompt_id, asked.sample_id, asked.token_ids, self.tokens, self.logps, self.versions, ended
        )


class DecodeLoop:
    """Rows that wait, and rows that are being written side by side.

    Args:
        rows: most that are written at a time.
        kv_bytes: what their keys and values, or their states, may take; None: half of what a GPU has free when the
            first request comes, elsewhere no bound.
    """

    def __init__(self, model: PreTrainedModel, *, pad_token_id: int, rows: int, kv_bytes: int | None) -> None:
        self.model, self.rows, self.kv_bytes = model, rows, kv_bytes
        self.prompts = PromptPass(model, pad_token_id)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.on_tokens: OnTokens | None = None  # hears of every step's tokens
        self._memory: KVMemory | OwnCache | None = None
        self._token_B: Tensor | None = None  # the last of each running row, which the model has not seen
        self._uniform_BT: Tensor | None = None  # random numbers of the next steps
        self._drawn = 0  # how many of those are used

    @property
    def open(self) -> int:
        return len(self.waiting) + len(self.running)

    @torch.no_grad()
    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """See `roles.protocols.Engine`."""
        taken = {row.request.sample_id for row in (*self.running, *self.waiting)}
        for request in requests:
            if request.sample_id in taken:
                raise ValueError(f"submit: sample_id {request.sample_id} is open already; give each request its own")
            taken.add(request.sample_id)
            if not request.token_ids:
                raise DataError(f"the prompt of request {request.sample_id} is empty; give at least one token")
        rows = [Row(request, sampling) for request in requests]
        if rows and not self.memory.fits(1, longest := max(row.final for row in rows)):
            raise DataError(
                f"a prompt and its answer may have {longest} tokens, and generator.kv_cache_gb="
                f"{self.kv_bytes / 2**30:g} does not hold the keys and values of one such sequence; raise it, or lower "
                "data.max_prompt_tokens or rollout.max_new_tokens"
            )
        self.waiting += rows

    def cancel(self, sample_ids: Collection[int]) -> None:
        gone = set(sample_ids)
        self.waiting = deque(row for row in self.waiting if row.request.sample_id not in gone)
        self._leave([place for place, row in enumerate(self.running) if row.request.sample_id in gone])

    def reread(self) -> None:
        """All rows are computed anew before their next token: the weights are others, or a step has failed."""
        self.waiting.extendleft(reversed(self.running))
        self.running = []
        if self._memory is not None:
            self._memory.clear()

    def free(self) -> None:
        """Give the memory back; what is open is computed anew when it goes on."""
        self.reread()
        if self._memory is not None:
            self._memory.free()

    @torch.no_grad()
    def step(self, version: int) -> list[Sample]:
        """The first token of rows that join, or the next of all that are being written; those that end with it."""
        try:
            joining = self._joining()
            if joining:
                return self._join(joining, version)
            return self._next(version) if self.running else []
        except BaseException:
            self.reread()
            raise

    @property
    def memory(self) -> KVMemory | OwnCache:
        if self._memory is None:
            probe = self.prompts.run([(self.prompts.pad_token_id,) * 2]).cache
            if self.kv_bytes is None and self.model.device.type == "cuda":
                self.kv_bytes = torch.cuda.mem_get_info(self.model.device)[0] // 2
            kind = KVMemory if fits_architecture(self.model, self.prompts.inputs, probe) else OwnCache
            self._memory = kind(self.model, self.prompts, probe, self.kv_bytes)
        return self._memory

    def _joining(self) -> list[Row]:
        """The waiting rows that there is room for, first come first served."""
        if not self.waiting or (self.running and not self.memory.joins_running):
            return []
        longest = max((row.final for row in self.running), default=0)
        found = 0
        for row in self.waiting:
            longest = max(longest, row.final)
            count = len(self.running) + found + 1
            if count > self.rows or not self.memory.fits(count, longest):
                break
            found += 1
        if found < min(len(self.waiting), len(self.running) // _WORTH):
            return []
        return [self.waiting.popleft() for _ in range(found)]

    def _join(self, joining: list[Row], version: int) -> list[Sample]:
        known = len(self.running)
        self.running += joining
        logits_BV = self.memory.join([row.prefix for row in joining], [row.final for row in joining])
        written_B = torch.tensor([len(row.tokens) for row in joining])
        u_B = keyed_uniform(seeds_of([row.request.seed for row in joining]), written_B)
        token_B = self._draw(joining, logits_BV, u_B.float().to(logits_BV.device))
        self._token_B = torch.cat([self._token_B, token_B]) if known else token_B
        self._uniform_BT = None
        return self._ended(joining, known, version)

    def _next(self, version: int) -> list[Sample]:
        logits_BV = self.memory.step(self._token_B)
        if self._uniform_BT is None or self._drawn == _AHEAD:
            written_B = torch.tensor([len(row.tokens) for row in self.running])
            seed_B = seeds_of([row.request.seed for row in self.running])
            uniform_BT = keyed_uniform(seed_B[:, None], written_B[:, None] + torch.arange(_AHEAD))
            self._uniform_BT = uniform_BT.float().to(logits_BV.device)  # MPS has no float64
            self._drawn = 0
        u_B = self._uniform_BT[:, self._drawn]
        self._drawn += 1
        self._token_B = self._draw(self.running, logits_BV, u_B)
        return self._ended(self.running, 0, version)

    def _draw(self, rows: Sequence[Row], logits_BV: Tensor, u_B: Tensor) -> Tensor:
        """A token of each row, noted there."""
        groups: dict[Sampling, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row.sampling, []).append(place)
        token_B = torch.empty(len(rows), dtype=torch.long, device=logits_BV.device)
        logp_B = torch.empty(len(rows), device=logits_BV.device)
        for sampling, places in groups.items():
            mine = slice(None) if len(groups) == 1 else torch.tensor(places, device=logits_BV.device)
            temperatures = [rows[place].temperature for place in places]
            token_B[mine], logp_B[mine] = draw(logits_BV[mine], u_B[mine], temperatures, sampling)
        tokens = token_B.tolist()
        for row, token, logp in zip(rows, tokens, logp_B.tolist(), strict=True):
            row.tokens.append(token)
            row.logps.append(logp)
        if self.on_tokens is not None:
            self.on_tokens(tokens)
        return token_B

    def _ended(self, rows: Sequence[Row], known: int, version: int) -> list[Sample]:
        """Samples of the rows that end with the token just drawn; `rows` stand behind `known` others."""
        samples, gone = [], []
        for place, row in enumerate(rows, start=known):
            row.versions.append(version)
            stopped = row.tokens[-1] in row.sampling.stop_token_ids
            if stopped or len(row.tokens) == row.sampling.max_new_tokens:
                samples.append(row.sample("stop" if stopped else "length"))
                gone.append(place)
        self._leave(gone)
        return samples

    def _leave(self, gone: Sequence[int]) -> None:
        """These rows leave; the last ones take their places, for that moves the fewest."""
        if not gone:
            return
        left = set(gone)
        count = len(self.running) - len(left)
        movers = iter(place for place in range(count, len(self.running)) if place not in left)
        kept = [next(movers) if place in left else place for place in range(count)]
        self.running = [self.running[place] for place in kept]
        self.memory.keep(kept)
        index = torch.tensor(kept, dtype=torch.long, device=self._token_B.device)
        self._token_B = self._token_B[index]
        if self._uniform_BT is not None:
            self._uniform_BT = self._uniform_BT[index]
