"""The way of the weights: vLLM's four calls, from the learner to every generator at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_ray.errors import DeadlineError, RlhfRayError, SyncError
from rlhf_ray.remote.calls import Deadline, Worker, next_done, value_of
from rlhf_ray.remote.failures import LostError
from rlhf_ray.remote.processes import kill
from rlhf_ray.roles.protocols import WeightReceiver
from rlhf_ray.sync.cuda_sender import shift_ranks

LOST = (LostError, DeadlineError)


class GeneratorsClient:
    """A `sync.sender.WeightClient`, used inside the learner's process.

    Each call goes to all generators at once, for an NCCL broadcast ends only when the last worker has joined it;
    the first generator that fails ends it, for the others may never return.

    Args:
        workers_each: GPU workers behind each generator (tensor parallel size).
        deadline: of one call.
        replaced: whether another process takes the place of a lost one. Then the others get their weights as if it had
            never been there, and who takes its place is sent them afterwards (`join`).
    """

    def __init__(
        self, generators: Sequence[Worker], *, workers_each: int, deadline: Deadline, replaced: bool = False
    ) -> None:
        self.generators = list(generators)
        self.workers_each = workers_each
        self.deadline = deadline
        self.replaced = replaced

    def only(self, generator: Worker) -> GeneratorsClient:
        """A client that reaches this one alone."""
        return GeneratorsClient(
            [generator], workers_each=self.workers_each, deadline=self.deadline, replaced=self.replaced
        )  # fmt: skip

    def join(self, generator: Worker) -> None:
        """From the next update on its calls go to this process, too. Nothing may be under way."""
        self.generators = [*(worker for worker in self.generators if worker.name != generator.name), generator]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [shift_ranks(init_info, index * self.workers_each) for index in range(len(self.generators))]
        self._all(WeightReceiver.init_weight_transfer_engine, [(info,) for info in infos])

    def start_weight_update(self) -> None:
        # One that refuses was left in the midst of an update, by a learner that was lost: it holds half of the weights,
        # and is lost, too.
        self._all(WeightReceiver.start_weight_update, [()] * len(self.generators), lost=(*LOST, SyncError))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._all(WeightReceiver.update_weights, [(update_info,)] * len(self.generators))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(WeightReceiver.finish_weight_update, [(weight_version,)] * len(self.generators))

    def _all(
        self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]],
        lost: tuple[type[RlhfRayError], ...] = LOST,
    ) -> None:  # fmt: skip
        """`lost`: errors after which a generator is replaced, where one can be."""
        waiting = [
            worker.ask(method, *args, deadline=self.deadline)
            for worker, args in zip(self.generators, arguments, strict=True)
        ]
        while waiting:
            call = next_done(waiting, check=lambda calls: None)
            waiting.remove(call)
            try:
                value_of(call)
            except RlhfRayError as error:
                if self.replaced and isinstance(error, lost):
                    self._leave_out(call.worker)
                elif call.worker.name in str(error):
                    raise
                else:
                    raise type(error)(f"{call.worker}: {error}") from error

    def _leave_out(self, worker: Worker) -> None:
        # It may hold half of the weights and answer again later, as after a loss of the network. Who watches the seats
        # hears of its death, and gives the seat to another process.
        kill(worker.actor)
        self.generators.remove(worker)
