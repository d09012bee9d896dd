"""Requests on their way to a generator: columns of numbers and each prompt once, in place of thousands of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_ray.roles.protocols import Request


@dataclass(frozen=True, eq=False)
class PackedRequests:
    """What a generator needs to know of N requests. What their prompts say beside the tokens stays with the driver."""

    prompts: tuple[np.ndarray, ...]  # int32 token ids
    prompt: np.ndarray  # [N] whose tokens, by place in `prompts`
    prompt_id: np.ndarray  # [N]
    sample_id: np.ndarray  # [N]
    seed: np.ndarray  # [N]
    temperatures: tuple[float | None, ...]  # [N]; () where no request has one of its own
    answers: Mapping[int, tuple[int, ...]]  # by place

    @staticmethod
    def of(requests: Sequence[Request]) -> PackedRequests:
        place: dict[int, int] = {}  # by identity: the members of a group have one and the same prompt
        prompts: list[np.ndarray] = []
        for request in requests:
            if id(request.token_ids) not in place:
                place[id(request.token_ids)] = len(prompts)
                prompts.append(np.asarray(request.token_ids, np.int32))
        own = any(request.temperature is not None for request in requests)
        return PackedRequests(
            tuple(prompts),
            np.asarray([place[id(request.token_ids)] for request in requests], np.int32),
            *(
                np.asarray([getattr(request, name) for request in requests], np.int64)
                for name in ("prompt_id", "sample_id", "seed")
            ),
            tuple(request.temperature for request in requests) if own else (),
            {i: request.answer for i, request in enumerate(requests) if request.answer is not None},
        )

    def requests(self) -> list[Request]:
        prompts = [tuple(tokens.tolist()) for tokens in self.prompts]
        numbers = (self.prompt_id.tolist(), self.sample_id.tolist(), self.prompt.tolist(), self.seed.tolist())
        return [
            Request(
                prompt_id, sample_id, prompts[prompt], seed,
                temperature=self.temperatures[i] if self.temperatures else None, answer=self.answers.get(i),
            )
            for i, (prompt_id, sample_id, prompt, seed) in enumerate(zip(*numbers, strict=True))
        ]  # fmt: skip
