"""Two small model folders, and a generator that answers from a table instead of computing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.roles.batch import Batch, build_batch
from rlhf_ray.roles.protocols import Request, Sampling

Answer = Callable[[Request, int], str]  # (request, number of the answer to its prompt) -> text


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `tuned`: two models of 16 positions over printable characters, with other weights."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer("char", [*map(chr, range(32, 127)), "\n"])
    for seed, name in enumerate(("base", "tuned")):
        model = build_scratch(
            "qwen2", vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2, max_length=16, seed=seed
        )
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


class TableGenerator:
    """`answer` gives its texts; every token of every text has probability `probability`."""

    def __init__(self, answer: Answer, probability: float) -> None:
        self.tokenizer = build_tokenizer("char", [*map(chr, range(32, 127)), "\n"])
        self.answer = answer
        self.probability = probability
        self.asked: list[list[Request]] = []
        self.sampling: list[Sampling] = []
        self.closed = False

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        self.asked.append(list(requests))
        self.sampling.append(sampling)
        seen: dict[int, int] = {}
        completions = []
        for request in requests:
            member = seen[request.prompt_id] = seen.get(request.prompt_id, -1) + 1
            text = self.answer(request, member)
            completions.append([*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id])
        return build_batch(
            requests, completions, [[-1.0] * len(c) for c in completions], truncated=[False] * len(requests),
            weight_version=0,
        )  # fmt: skip

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[0.0] + [math.log(self.probability)] * (len(row) - 1) for row in tokens]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def table(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, TableGenerator]]:
    """table(base=(answer, probability), tuned=...): what the models of these folders say from now on."""

    def install(**answers: tuple[Answer, float]) -> dict[str, TableGenerator]:
        made = {name: TableGenerator(*given) for name, given in answers.items()}

        def make(settings, assets, use):
            return made[Path(assets.policy).name]

        monkeypatch.setattr("rlhf_ray.evaluation.answers.make_generator", make)
        return made

    return install
