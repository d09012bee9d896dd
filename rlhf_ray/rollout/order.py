"""In which order prompts are asked: shuffled anew each epoch, as they stand, or as a function of the user's says.

Such a function is a curriculum: `order(rows, epoch, seed)` gives the indices of an epoch's rows, in order. It may leave
rows out and name others more than once, so an epoch can be a pool of the easy ones. `rows` are the columns of each
prompt's row and `prompt`, its text. A run that goes on calls it again, so it must depend on its arguments alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_ray.config.user_code import find, is_place
from rlhf_ray.config.user_frames import frames_of_users
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.stream import Order, Stream, stream_over
from rlhf_ray.errors import ConfigError

UserOrder = Callable[[Sequence[Mapping[str, Any]], int, int], Sequence[int]]

SHUFFLED, AS_GIVEN = "shuffled", "as_given"


def prompt_stream(prompts: PromptSet, order: str, seed: int) -> Stream:
    """The stream of these prompts; sources with weights have each its own epochs, in this order.

    Raises:
        ConfigError: there is no such order, or what the function gives for the first epoch is none.
    """
    if order == SHUFFLED:
        return stream_over(prompts.parts, seed)
    if order == AS_GIVEN:
        return stream_over(prompts.parts, seed, order=lambda rows, epoch: rows)
    if not is_place(order):
        near = difflib.get_close_matches(order, (SHUFFLED, AS_GIVEN), n=1)
        hint = f"did you mean {near[0]}?" if near else f"it is {SHUFFLED}, {AS_GIVEN}, or module:function of your own"
        raise ConfigError(f"rollout.order={order} is unknown: {hint}")
    function = find(order, "order")
    if not callable(function):
        raise ConfigError(f"rollout.order={order} is a {type(function).__name__}, not a function; name a function")
    rows = [{**example.columns, "prompt": example.prompt} for example in prompts.examples]
    stream = stream_over(prompts.parts, seed, order=_of_user(function, order, rows, seed))
    stream[0]  # a mistake is told before anything is made
    return stream


def _of_user(function: UserOrder, name: str, rows: Sequence[Mapping[str, Any]], seed: int) -> Order:
    def order(own: range, epoch: int) -> Sequence[int]:
        try:
            indices = list(function(rows[own.start : own.stop], epoch, seed))
        except Exception as error:  # whatever the user's function does
            said = f"rollout.order={name} failed for epoch {epoch} ({type(error).__name__}: {error}); mend it"
            raise ConfigError("\n  ".join([said, *frames_of_users(error)])) from error
        wrong = [index for index in indices if type(index) is not int or not 0 <= index < len(own)]
        if wrong or not indices:
            what = f"has {wrong[0]!r}, which is no index" if wrong else "is empty"
            raise ConfigError(
                f"rollout.order={name}: the order of epoch {epoch} {what}; return some of the whole numbers from 0 to "
                f"{len(own) - 1}, one for each prompt to ask"
            )
        return [own.start + index for index in indices]

    return order
