"""What the loop may ask of each role.

Locally a handle is the role object itself; on Ray it is a typed proxy (`remote/proxy.py`) to actors that
host the same class. The loop sees only these protocols, and treats a batch as opaque except for `replace`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from rlhf_ray.data.chat import Chat
from rlhf_ray.roles.batch import Batch, gather
from rlhf_ray.sample import Sample
from rlhf_ray.sync.canary import CanaryTarget

if TYPE_CHECKING:
    from rlhf_ray.config.algorithm import AlgorithmConfig
    from rlhf_ray.models.written import Written
    from rlhf_ray.roles.division import Division


@dataclass(frozen=True)
class Request:
    """One completion to sample.

    `seed` is a function of (run seed, step, prompt, member): the same request gives the same tokens on any
    generator, in any batch, at any later time, as long as the weights are the same. `temperature` takes the place
    of the step's own. `chat` is the prompt as a conversation, before any template, for judges that have their own;
    None: a plain text. A request with an `answer` is not sampled: that completion becomes its row.
    """

    prompt_id: int
    sample_id: int
    token_ids: tuple[int, ...]
    seed: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    answer: tuple[int, ...] | None = None
    chat: Chat | None = None


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch truncation off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch: plain numbers, small enough to travel through a driver.

    Where a reward function failed and its policy is to drop the group, `score` and the function's own number are NaN.
    Its own number alone is NaN where the row is not its to judge.
    """

    score: Tensor  # [B] float32, the weighted sum
    by_function: Mapping[str, Tensor]  # name -> [B] unweighted
    texts: tuple[tuple[str, str], ...]  # (prompt, completion) of as many rows as were asked for
    keep: Tensor | None = None  # [B] bool, False: the row's group was dropped; None: all rows count
    stats: Mapping[str, float] = field(default_factory=dict)  # fault/retries, fault/dropped (groups), ...
    events: tuple[Mapping[str, Any], ...] = ()  # what failed and what was done about it, for events.jsonl
    completion_ids: tuple[tuple[int, ...], ...] = ()  # of the rows that have texts; `select` and `cat` leave them out

    def of_row(self, row: int) -> dict[str, float | None]:
        """Each function's number, None where it has none, as JSON writes it."""
        values = {name: float(value_B[row]) for name, value_B in self.by_function.items()}
        return {name: None if math.isnan(value) else value for name, value in values.items()}

    def select(self, rows: Sequence[int]) -> Scores:
        """The given rows, all of them judged, in order; texts of as many of the first of them as have one."""
        index = torch.tensor(rows, dtype=torch.long)
        texts = itertools.takewhile(lambda row: row < len(self.texts), rows)
        named = {name: value_B[index] for name, value_B in self.by_function.items()}
        return Scores(self.score[index], named, tuple(self.texts[row] for row in texts))

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        """Judged rows of all parts, in order; the texts end with the first row that has none."""
        texts: list[tuple[str, str]] = []
        rows = 0
        for part in parts:
            if len(texts) == rows:
                texts += part.texts
            rows += len(part.score)
        named = {name: torch.cat([part.by_function[name] for part in parts]) for name in parts[0].by_function}
        return Scores(torch.cat([part.score for part in parts]), named, tuple(texts))


@dataclass(frozen=True)
class Estimate:
    """New columns of a batch, and what to log about them."""

    columns: dict[str, Tensor]  # advantages [B] or [B, T]; returns [B, T] where there is a critic
    stats: dict[str, float]


Method = TypeVar("Method", bound=Callable[..., Any])


def reads(*columns: str) -> Callable[[Method], Method]:
    """Which columns of its batch a method reads, as far as there are any, beside tokens, masks and ids.

    On Ray nothing else is sent. `TEXTS`: the columns and conversations of the prompts.
    """

    def mark(method: Method) -> Method:
        method.reads = columns  # type: ignore[attr-defined]
        return method

    return mark


TEXTS = "texts"


class WeightReceiver(Protocol):
    """vLLM's own four weight-transfer calls; every generator answers them."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@runtime_checkable
class Engine(WeightReceiver, Protocol):
    """Writes answers step by step: requests join at any time, and weights may change between two steps.

    A request's tokens depend on its seed, its prompt and the weights alone: not on its neighbours, nor on when it
    joined. Where weights change while it is being written, each token's version says which wrote it.
    """

    @property
    def open(self) -> int:
        """Requests that were submitted and have neither ended nor been cancelled."""

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Take requests on; nothing is computed yet. Their sample_ids differ from each other and from all open ones.

        Raises DataError for a prompt that is empty or too long.
        """

    def collect(self) -> list[Sample]:
        """Run the engine until a request ends; all that ended with that step. Empty only if nothing is open.

        Raises RequestError if the engine gave up some of them, while the others go on; EngineError if it died.
        """

    def cancel(self, sample_ids: Sequence[int]) -> None:
        """Drop these requests and what has been written of them; those that are not open are passed over."""


class Generator(WeightReceiver, Protocol):
    """Samples completions and says with what probability it did."""

    @property
    def version(self) -> int:
        """The weight version it holds."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        """One row a request, in request order."""

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it, at temperature 1; the first entry is 0."""

    def sleep(self) -> None:
        """Give accelerator memory back to a colocated learner; nothing on CPU."""

    def wake(self) -> None:
        """Undo `sleep`."""

    def close(self) -> None:
        """Free everything."""


class ParcelGenerator(Generator, Protocol):
    """One that tells what has been written while the rest still is."""

    def generate_parcels(
        self, requests: Sequence[Request], sampling: Sampling, parcels: Sequence[range],
        written: Callable[[int, Batch], None],
    ) -> Batch:  # fmt: skip
        """As `generate`. `written` is given each of these ranges of the requests, whole groups, and its rows as a batch
        of its own as soon as all of them have ended; what it raises ends the call."""


Gather = Callable[[Sequence[tuple[Batch, Sequence[int]]]], Batch]


class BatchStore(Protocol):
    """How a batch comes to where it can be written down, and back to where it is computed with."""

    def fetch(self, batch: Any) -> Batch: ...
    def place(self, batch: Batch) -> Any: ...


class Here:
    """The store of batches that are there already."""

    def fetch(self, batch: Batch) -> Batch:
        return batch

    def place(self, batch: Batch) -> Batch:
        return batch


HERE = Here()


class Reward(Protocol):
    @reads(TEXTS)
    def score(self, batch: Batch, texts: int = 0, first: int = 0) -> Scores:
        """Reward of each row, and the decoded text of the first `texts` rows. Raises RewardError.

        `first`: the place of its first row in the step, for what is said of rows.
        """


class Advantages(Protocol):
    def estimate(self, batch: Batch, kl_coef: float) -> Estimate:
        """Advantages (and returns) of a scored batch."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Divided(Protocol):
    """Whose work on a batch is divided, over ranks or over replicas."""

    @property
    def division(self) -> Division:
        """How a step's rows are divided."""


class Reference(Divided, Protocol):
    @reads("temperature")
    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] log-probabilities of the batch's tokens under the frozen policy."""


class TokenWork(Protocol):
    """Who holds columns of the tokens, all of them or those of its own rows, and computes what needs them."""

    @reads("logp_old", "logp_ref")
    def answer_kl(self, batch: Batch, algorithm: AlgorithmConfig) -> Tensor:
        """[B] KL to the reference, summed over each answer's tokens."""

    @reads("score", "values", "logp_old", "logp_ref")
    def token_advantages(self, batch: Batch, algorithm: AlgorithmConfig, kl_coef: float) -> Estimate:
        """Advantages that differ from token to token, and where there is a critic its targets. Collective."""


class Ranks(TokenWork, Divided, Protocol):
    """Processes that train one network together."""


class Saves(Protocol):
    """A network in training on disk: roles/checkpointed.py says more."""

    def save(self, folder: Path) -> Written | None:
        """All that a bit-equal continuation needs; what was written."""

    def begin_save(self, folder: Path) -> None:
        """As `save`, but back as soon as the state is copied: `saved` has the rest."""

    def is_saved(self) -> bool: ...
    def saved(self) -> Written | None: ...
    def load(self, folder: Path) -> None:
        """Undo `save`."""


class Critic(Ranks, Saves, Protocol):
    @reads()
    def values(self, batch: Batch) -> Tensor:
        """[B, T] value before each token is chosen."""

    def begin(self, step: int, streamed: bool = False) -> None:
        """As `Learner.begin`."""

    @reads("values", "returns")
    def learn(self, batch: Batch) -> None:
        """Fit `batch.returns`. As `Learner.learn`."""

    def finish(self) -> dict[str, float]:
        """As `Learner.finish`."""



class Learner(Ranks, Saves, Protocol):
    @property
    def version(self) -> int:
        """The weight version that it sent last; 0 before the first."""

    def connect(self, generators: WeightReceiver) -> None:
        """Say where `push_weights` sends to: one generator, or a client that fans out to several."""

    @reads("temperature")
    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] log-probabilities under the current policy, at the sampling temperature."""

    @reads("temperature")
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """[B, T] the same under the policy that the run began with, where that is this one without its adapter."""

    def begin(self, step: int, kl_coef: float, streamed: bool = False) -> None:
        """Open step 0, 1, ...; `learn` comes next, then `finish`. Until then weights do not leave. Raises StepError.

        `streamed`: the rows come in waves, to one optimiser step; else all at once, to as many as the config says.
        """

    @reads("temperature", "logp_gen", "weight_version", "logp_old", "logp_ref", "advantages")
    def learn(self, batch: Batch) -> None:
        """Learn from these rows: all of the step's (every inner epoch and minibatch), or a wave. Raises StepError."""

    def finish(self) -> dict[str, float]:
        """End the step; its metrics by their final names. Raises StepError."""

    def push_weights(self, version: int) -> dict[str, float]:
        """Send the weights to every generator; metrics by their final names. Raises SyncError."""

    def canary_logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Like `Generator.logprobs`, under the weights that were pushed."""

    def export_model(self, folder: Path) -> None:
        """Write a plain Hugging Face folder."""

    def export_adapter(self, folder: Path) -> None:
        """Write what LoRA has learned, and nothing else, as a folder that PEFT reads."""


@dataclass(frozen=True)
class Roles:
    """Everyone who takes part in a step."""

    generator: Generator
    reward: Reward
    learner: Learner
    advantages: Advantages
    reference: Reference | None = None
    critic: Critic | None = None
    replicas: Sequence[CanaryTarget] = ()  # each generator by itself, for the canary
    gather: Gather = gather  # one batch from the given rows of several
    store: BatchStore = HERE  # for checkpoints
    judges: int = 1  # replicas of the reward: so many calls at once
    # Rewards may be computed while other answers are still being written: the generator is a ParcelGenerator.
    early_rewards: bool = False
    parallel: bool = False  # roles run on workers of their own, so waiting for one need not wait for all
    devices: float = 1.0  # accelerators that the run occupies; on CPU, machines
    # After RanksLostError: returns seconds, once other processes have taken the seats; they need a checkpoint first.
    rejoin: Callable[[], Mapping[str, float]] = dict
    device_name: str | None = None  # the maker's, or cpu or mps; None where they differ or nobody knows
