"""One call of a reward function, here or in a process of its own, and what it came to."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.rewards.adapters import Adapter, adapt
from rlhf_ray.rewards.failures import FailurePolicy, Outcome, checked, raised
from rlhf_ray.rewards.loading import check_settings, find_function, is_builtin
from rlhf_ray.rewards.process import Child, ChildLost

Inputs = Mapping[str, Sequence[Any]]  # what TRL's convention passes, each with one entry a row

BEGIN_S = 10.0  # a thread begins in much less
LOOK_S = 0.2  # between two looks for ctrl-C


@dataclass(frozen=True)
class RewardFunction:
    """A function in TRL's convention, with its fixed arguments and its weight in the sum.

    `timeout_s` bounds an async function; a sync one that runs in this process cannot be stopped.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    policy: FailurePolicy = FailurePolicy()
    timeout_s: float | None = None

    def call(self, inputs: Inputs) -> Any:
        """What the function returns (a coroutine, if it is async), given those inputs that it takes."""
        given = {**inputs, **self.args}
        parameters = inspect.signature(self.function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return self.function(**given)
        return self.function(**{p.name: given[p.name] for p in parameters if p.name in given})

    def close(self) -> None:
        """End the process of an isolated function."""
        if isinstance(self.function, IsolatedFunction):
            self.function.child.close()


def start(function: RewardFunction, inputs: Inputs) -> Outcome | Awaitable[Outcome]:
    """Call it: an outcome, or for an async function what to wait for (`together`).

    Raises:
        ConfigError, ModelError: the function explains wrong arguments of its own.
    """
    rows = len(inputs["completions"])
    try:
        returned = function.call(inputs)
    except (ConfigError, ModelError):
        raise
    except (Exception, SystemExit) as error:  # sys.exit() would end the run as if it had finished
        return raised(error, inputs, rows)
    if inspect.isawaitable(returned):
        return _settled(returned, function.timeout_s, inputs)
    return checked(returned, rows)


def together(awaitables: Sequence[Awaitable[Outcome]]) -> list[Outcome]:
    """Their outcomes, all waited for at the same time."""

    async def gathered() -> list[Outcome]:
        return await asyncio.gather(*awaitables)

    return run_coroutine(gathered()) if awaitables else []


async def _settled(awaitable: Awaitable[Any], timeout_s: float | None, inputs: Inputs) -> Outcome:
    async def returned() -> Any:
        try:
            return await awaitable
        except SystemExit as error:  # inside a task it would tear the event loop down
            return raised(error, inputs, rows)

    rows = len(inputs["completions"])
    task = asyncio.ensure_future(returned())
    done, _ = await asyncio.wait([task], timeout=timeout_s)
    if not done:
        task.cancel()
        return Outcome.failed(rows, f"did not return within {timeout_s:g} s", "make it faster, or raise its timeout_s")
    try:
        return checked(task.result(), rows)
    except ConfigError:
        raise
    except Exception as error:
        return raised(error, inputs, rows)


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Its result, also where a loop runs already (a notebook, an async actor): in a thread of its own then."""
    if not _loop_runs():
        return asyncio.run(coroutine)
    begun: SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = SimpleQueue()
    result: Future[Any] = Future()

    async def known() -> Any:
        begun.put((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    def run() -> None:
        try:
            result.set_result(asyncio.run(known()))
        except BaseException as error:  # whatever it is, it belongs to who asked
            result.set_exception(error)

    try:
        # No pool: it would not know of a thread that ctrl-C meets while it starts, and so not wait for it.
        threading.Thread(target=run, name="coroutine", daemon=True).start()
        while not result.done():  # a signal that comes just before an endless wait would not interrupt it
            wait([result], timeout=LOOK_S)
        return result.result()
    except KeyboardInterrupt:  # only this thread gets it
        with contextlib.suppress(Empty, RuntimeError):  # it has not begun, or has ended by now
            loop, task = begun.get(timeout=BEGIN_S)
            loop.call_soon_threadsafe(task.cancel)
            wait([result])
        raise


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class IsolatedFunction:
    """A function, by its name in a config, that lives in a process of its own and may be killed there."""

    def __init__(self, function: str, adapter: Adapter, args: Mapping[str, Any], timeout_s: float) -> None:
        spec = {"function": function, "adapter": adapter, "args": dict(args)}
        self.child = Child("rlhf_ray.rewards.calling:serve", spec)
        self.timeout_s = timeout_s
        self.child.start()

    async def __call__(self, **inputs: Any) -> Outcome:
        try:
            answer = await asyncio.to_thread(self.child.call, inputs, self.timeout_s)
        except ChildLost as error:
            rows = len(inputs["completions"])
            return Outcome.failed(rows, str(error), "mend the function, or raise its timeout_s if it is only slow")
        except asyncio.CancelledError:  # Ctrl-C: the event loop does not end before the thread that waits does
            self.child.interrupt()
            raise
        return Outcome.from_json(answer)


def serve(function: str, adapter: Adapter, args: Mapping[str, Any]) -> Callable[[Inputs], dict[str, Any]]:
    """What an `IsolatedFunction`'s process answers with."""
    found = bind(function, adapter, args)

    def answer(inputs: Inputs) -> dict[str, Any]:
        outcome = start(found, inputs)
        return (outcome if isinstance(outcome, Outcome) else together([outcome])[0]).as_json()

    return answer


def bind(function: str, adapter: Adapter, args: Mapping[str, Any]) -> RewardFunction:
    """The function that a config names, in TRL's convention, with its `args`. Raises ConfigError."""
    found = find_function(function)
    if is_builtin(function):
        check_settings(function, found, args)
        # A column of the data may be called like a setting ("chinese" beside "english"); it is not one.
        settings = inspect.signature(found).parameters.values()
        args = {p.name: p.default for p in settings if p.kind is p.KEYWORD_ONLY and p.default is not p.empty} | args
    adapted = adapt(found, adapter, args)
    # An adapter has given the arguments already, for there they are not among the columns.
    return RewardFunction(function, adapted, args=args if adapted is found else {})
