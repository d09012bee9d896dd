"""Many requests as columns of numbers, each prompt once: a step may ask for tens of thousands of answers.

They are a sequence of `Request`s, but each of these is made when somebody looks at it, and that is the generator which
writes its answer. Who only hands them on pays by the prompt, and not by the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from rlhf_ray.data.chat import Chat
from rlhf_ray.roles.protocols import Request
from rlhf_ray.sample import SampleSeeds

Texts = tuple[Mapping[str, Any], Chat | None]  # a prompt's columns, and what it is as a conversation

NOTHING: Texts = ({}, None)


@dataclass(frozen=True, eq=False)
class Requests(Sequence[Request]):
    """N requests that ask P prompts."""

    tokens: tuple[tuple[int, ...], ...]  # [P] of each prompt
    texts: tuple[Texts, ...]  # [P] what the prompts say beside that, for those who judge; () where that is nobody
    prompt: np.ndarray  # [N] int32, which of the prompts
    prompt_id: np.ndarray  # [N] int64
    sample_id: np.ndarray  # [N] int64
    seed: SampleSeeds | np.ndarray  # [N]
    temperature: np.ndarray | None = None  # [N] float64, NaN: the step's own; None: so everywhere
    answers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # by place, of those that are not sampled

    @staticmethod
    def of(requests: Sequence[Request]) -> Requests:
        """The same requests as columns; those with one prompt_id say the same of it."""
        if isinstance(requests, Requests):
            return requests
        places: dict[tuple[int, int], int] = {}
        # By identity: the members of a group have one and the same tuple.
        keys = [(request.prompt_id, id(request.token_ids)) for request in requests]
        prompt = [places.setdefault(key, len(places)) for key in keys]
        first = dict(zip(reversed(prompt), reversed(requests), strict=True))
        asked = [first[place] for place in range(len(places))]
        own = [request.temperature for request in requests]
        return Requests(
            tuple(request.token_ids for request in asked),
            tuple((request.columns, request.chat) for request in asked),
            np.asarray(prompt, np.int32),
            *(
                np.asarray([getattr(request, name) for request in requests], np.int64)
                for name in ("prompt_id", "sample_id", "seed")
            ),
            None if all(t is None for t in own) else np.asarray(own, np.float64),
            {i: request.answer for i, request in enumerate(requests) if request.answer is not None},
        )

    def __len__(self) -> int:
        return len(self.prompt)

    @overload
    def __getitem__(self, place: int) -> Request: ...
    @overload
    def __getitem__(self, place: slice) -> Requests: ...
    def __getitem__(self, place: int | slice) -> Request | Requests:
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        place = range(len(self))[place]  # counts from the end, too, and refuses what is beyond it
        return next(iter(self.select(np.asarray([place]))))

    def __iter__(self) -> Iterator[Request]:
        texts = self.texts or (NOTHING,) * len(self.tokens)
        own = itertools.repeat(None) if self.temperature is None else self.temperature.tolist()
        numbers = zip(self.prompt.tolist(), self.prompt_id.tolist(), self.sample_id.tolist(), own, strict=False)
        for place, (prompt, prompt_id, sample_id, temperature) in enumerate(numbers):
            columns, chat = texts[prompt]
            yield Request(
                prompt_id, sample_id, self.tokens[prompt], int(self.seed[place]), columns,
                None if temperature != temperature else temperature,  # NaN differs from itself
                self.answers.get(place), chat,
            )  # fmt: skip

    def select(self, places: np.ndarray) -> Requests:
        """Those in the given places, in order."""
        used, prompt = np.unique(self.prompt[places], return_inverse=True)
        return Requests(
            tuple(self.tokens[i] for i in used.tolist()),
            tuple(self.texts[i] for i in used.tolist()) if self.texts else (),
            prompt.astype(np.int32),
            self.prompt_id[places],
            self.sample_id[places],
            self.seed[places],
            None if self.temperature is None else self.temperature[places],
            {new: self.answers[old] for new, old in enumerate(places.tolist()) if old in self.answers}
            if self.answers else {},
        )  # fmt: skip

    def without_texts(self) -> Requests:
        """What a generator needs to know of them."""
        return replace(self, texts=())

    @property
    def texts_by_id(self) -> dict[int, Texts]:
        """What the prompts say beside their tokens, by prompt_id."""
        _, first = np.unique(self.prompt, return_index=True)
        return dict(zip(self.prompt_id[first].tolist(), self.texts, strict=True))
