"""One remote call at a time: to whom, until when, and what came of it. Nothing here waits without a deadline."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from rlhf_ray.errors import DeadlineError, RlhfRayError, WorkerError
from rlhf_ray.remote.failures import CutError, LostError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

# While waiting, how often to look whether some other worker has died meanwhile.
POLL_S = 0.5
# A wait that takes so much longer was stopped, as all processes of a job are by its scheduler: nobody worked meanwhile.
STOPPED_S = 5.0
# A result that is ready is a few numbers: longer than this, and its node is gone.
FETCH_S = 60.0
NAMED_PROMPTS = 5

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Deadline:
    seconds: float
    setting: str  # which raises it


@dataclass(frozen=True)
class Process:
    """Who sits in a seat: an actor, its node's address, and its pid there."""

    actor: ActorHandle
    node: str = "?"
    pid: int = 0


class Worker:
    """A seat of the run ("learner rank 1"). Handles keep it, for who sits there may change: `process`."""

    def __init__(self, name: str, actor: ActorHandle, node: str = "?", pid: int = 0) -> None:
        self.name = name
        self.process = Process(actor, node, pid)

    @property
    def actor(self) -> ActorHandle:
        return self.process.actor

    @property
    def node(self) -> str:
        return self.process.node

    @property
    def pid(self) -> int:
        return self.process.pid

    def __str__(self) -> str:
        return f"{self.name} (node {self.node}, pid {self.pid})"

    def start(self, method: Callable[..., Any], *args: Any, deadline: Deadline) -> Call:
        """Begin `method` of the actor's class; it must return one small value, behind others that are kept."""
        name = method.__name__
        return Call(self, name, lambda actor: getattr(actor, name).remote(*args), deadline)

    def ask(
        self, method: Callable[..., Any], *args: Any, deadline: Deadline, keywords: Mapping[str, Any] = {}
    ) -> Call:
        """Begin `method` of the role that the actor hosts; it must return one small value."""
        name = method.__name__
        return Call(self, name, lambda actor: actor.ask.remote(name, args, keywords), deadline)

    def compute(
        self, method: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any], delivery: Any,
        slices: Sequence[ObjectRef], *, deadline: Deadline,
    ) -> Call:  # fmt: skip
        """Begin `method` of the role with a batch (`RoleHost.compute`). References stand at the top level, where Ray
        resolves them on the worker."""
        name = method.__name__
        return Call(self, name, lambda actor: actor.compute.remote(name, args, keywords, delivery, *slices), deadline)

    def cut(
        self, names: Sequence[str], picks: Sequence[Any], held: Sequence[ObjectRef], *, deadline: Deadline
    ) -> Call:  # fmt: skip
        """Begin to cut a slice for each consumer out of what the actor holds; the call keeps them."""
        count = len(picks) + 1

        def send(actor: ActorHandle) -> Any:
            return actor.cut.options(num_returns=count).remote(names, picks, *held)

        return Call(self, "cut", send, deadline)


class Call:
    """A remote call under way.

    Attributes:
        kept: references to large results, which stay references. They are final when the call has returned.
        ref: of the small one, which says that it has.
        process: to whom it was sent.
        elsewhere: whoever waits for it sends it to another seat if it is lost.
        others: seats that may do it in the place of its own.
        prompts: those that it is about now, by prompt_id: what to look at if it never ends.
        late: it did not return in time.
        told_slow: somebody has been told that half of the time is gone.
    """

    def __init__(self, worker: Worker, name: str, send: Callable[[ActorHandle], Any], deadline: Deadline) -> None:
        self.worker = worker
        self.name = name
        self.deadline = deadline
        self.tries = 0
        self.prompts: Callable[[], Iterable[int]] = tuple
        self.needs_no_weights = name == "cut"  # of a generator: a process that has loaded can do it
        self.elsewhere = False
        self.others: Sequence[Worker] = ()
        self._send = send
        self.start()

    def start(self) -> None:
        """Send it, also once more, to the process that sits there now."""
        self.process = self.worker.process
        refs = self._send(self.process.actor)
        *self.kept, self.ref = refs if isinstance(refs, list | tuple) else [refs]
        self.parked = self.cut_off = self.late = self.told_slow = False
        self.tries += 1
        self.renew()

    def renew(self) -> None:
        """Its time begins now: what its worker did before it has ended."""
        self.until = time.monotonic() + self.deadline.seconds

    def park(self, *, cut_off: bool) -> None:
        """It was lost, and will be sent again when somebody can do it. `cut_off`: the same process may do it, too."""
        self.parked, self.cut_off = True, cut_off

    def about(self, prompts: Callable[[], Iterable[int]]) -> Call:
        self.prompts = prompts
        return self

    @property
    def prompts_in_words(self) -> str:
        """Nothing, or `, with prompts 3, 4, 7 and 21 more,`."""
        ids = sorted(set(self.prompts()))
        first, more = ", ".join(map(str, ids[:NAMED_PROMPTS])), len(ids) - NAMED_PROMPTS
        if not ids:
            return ""
        return f", with prompt{'s' * (len(ids) > 1)} {first}" + (f" and {more} more," if more > 0 else ",")

    def __str__(self) -> str:
        return f"{self.name} of {self.worker}"


def next_done(calls: Sequence[Call], check: Callable[[Sequence[Call]], None]) -> Call:
    """The first call that ends, well or not, or is late.

    Args:
        check: raises if the run is lost for another reason, and sends parked calls again; called now and then with the
            calls under way.
    """
    while True:
        if any(call.parked for call in calls):
            check(calls)
        by_ref = {call.ref: call for call in calls if not call.parked}
        if not by_ref:
            time.sleep(POLL_S)
            continue
        first = min(by_ref.values(), key=lambda call: call.until)
        left = first.until - time.monotonic()
        _require_ray()
        began, seconds = time.monotonic(), max(0.0, min(POLL_S, left))
        done, _ = ray.wait(list(by_ref), num_returns=1, timeout=seconds)
        pause = time.monotonic() - began - seconds
        if pause > STOPPED_S:
            for call in calls:
                call.until += pause
        if done:
            return by_ref[done[0]]
        check(calls)
        if left <= 0:
            first.late = True
            return first


def value_of(call: Call) -> Any:
    """The result of a call that has ended. Raises what it raised, LostError if its worker or its result is lost, or
    DeadlineError if it did not return in time."""
    if call.late:
        raise DeadlineError(
            f"{call}{call.prompts_in_words} did not return within {call.deadline.seconds:.0f} s: it hangs, or the work "
            f"is too much; look at that process, raise {call.deadline.setting}, or resume with --resume auto"
        )
    _require_ray()
    try:
        return ray.get(call.ref, timeout=FETCH_S)
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RlhfRayError):
            raise cause from None
        raise WorkerError(f"{call} failed: {error}") from None
    except ActorUnavailableError as error:
        raise CutError(
            f"{call} was cut off: {one_line(error)}; look at the network, then resume with --resume auto"
        ) from None
    except RayActorError as error:
        raise death(call.worker, error, f"during {call.name}") from None
    except RayError as error:  # its result or an argument was lost with the node that held it
        raise LostError(f"{call}: the result is lost ({one_line(error)}); resume with --resume auto") from None


def _require_ray() -> None:
    """For a thread that outlives the run: Ray would start anew for whoever asks it for something."""
    if not ray.is_initialized():
        raise WorkerError("the run is over, and its workers have been ended")


def first_result(
    calls: Sequence[Call],
    check: Callable[[Sequence[Call]], None],
    again: Callable[[Call, LostError | DeadlineError], bool] = lambda call, error: False,
) -> tuple[Call, Any]:
    """The first call that returns, and its result. The first failure raises, unless `again` has parked that call."""
    while True:
        call = next_done(calls, check)
        try:
            return call, value_of(call)
        except (LostError, DeadlineError) as error:
            if not again(call, error):
                raise


def death(worker: Worker, error: BaseException, when: str) -> LostError:
    if "creation task" in str(error):
        return LostError(
            f"{worker.name} did not start: {one_line(error)}; every machine of the cluster needs this version of "
            "rlhf-ray with the same extras"
        )
    return LostError(
        f"{worker} died {when}: {reason_of(error)}; look for a signal or the out-of-memory killer on that node, "
        "then resume with --resume auto"
    )


def reason_of(error: BaseException) -> str:
    """What Ray knows of a death, without its ids and its list of common causes."""
    text = one_line(error, limit=10_000)
    found = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text)
    found = found or re.search(r"((?:actor|node) (?:is dead|has died|died) because .*)", text)
    return (found[1] if found else one_line(error)).rstrip(".")


def silence(worker: Worker, seconds: float, when: str) -> DeadlineError:
    return DeadlineError(
        f"{worker} hangs: it gave no sign of life for {seconds:.0f} s {when}; its process is stopped or stuck, or its "
        "machine is gone: look there, then resume with --resume auto"
    )


def one_line(error: BaseException, limit: int = 700) -> str:
    """Ray's paragraphs as a sentence; of a long text the end, where a traceback says what it is about."""
    text = " ".join(_COLOURS.sub("", str(error)).split())
    return text if len(text) <= limit else f"{text[: limit // 4]} ... {text[-limit * 3 // 4 :]}"
