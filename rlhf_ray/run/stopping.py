"""Ctrl-C and SIGTERM during a run's steps: the first lets the step that is going on end with a checkpoint, the second
ends the run at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from rlhf_ray import pulse
from rlhf_ray.errors import Terminated

SAID = (
    b"\nrlhf-ray: stopping after this step, with a checkpoint (the same once more: at once, back to the last one)\n"
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def terminated(number: int, frame: FrameType | None) -> None:
    """What a command does at a SIGTERM outside its steps."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # a second one must not interrupt the run's last words
    raise Terminated


# Whoever has put a handler of its own in the place of these knows better.
_DEFAULTS = (signal.default_int_handler, signal.SIG_DFL, terminated)


class Stop:
    """Whether somebody has asked the run to stop. Heard between `listen` and `forget`, in the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._heeded = False
        self._sign = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python hands signals to that one alone
        for number in SIGNALS:
            if signal.getsignal(number) in _DEFAULTS:
                self._before[number] = signal.signal(number, self._hear)

    def forget(self) -> None:
        """From here on signals do what they did before. Also where nobody has listened."""
        while self._before:
            signal.signal(*self._before.popitem())

    def heed(self) -> bool:
        """Whether somebody has asked by now. Who calls this does what has been promised before the run ends."""
        self._heeded = self.requested
        return self._heeded

    def go(self) -> None:
        """Ends the run, where that was asked for and `heed` has said so; else a signal that came between the two would
        end it without its checkpoint. Raises KeyboardInterrupt, after a SIGTERM Terminated."""
        if self._heeded:
            self._end()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._sign = number
        pulse.asked_to_stop(1 + self.requested)
        if self.requested:
            self._end()
        self.requested = True
        os.write(2, SAID)  # print may be in the midst of a line, and cannot be entered twice

    def _end(self) -> None:
        self.forget()
        if self._sign == signal.SIGTERM:
            signal.signal(signal.SIGTERM, lambda *_: None)  # nor may a third one interrupt the last words
            raise Terminated
        raise KeyboardInterrupt
