"""Signs of life of this process for the one that watches over it (`--restart`).

A stopped process gives none. One whose threads wait for each other says so itself: a thread of its own looks what the
run has done since the last time, and a long step does something, it computes or waits for calls that have deadlines.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

# The file descriptor on which this process gives signs of life, in its environment.
VARIABLE = "RLHF_RAY_PULSE"
# A run that does less than this share of the time stands still: the thread that looks uses a thousandth itself.
LEAST_SHARE = 0.01

_beats = 0


def beat() -> None:
    """Whoever waits for something that has a deadline says so now and then: it does not compute, and is not stuck."""
    global _beats
    _beats += 1


class Pulse:
    """
    Args:
        line: a file descriptor; `alive SECONDS` says how long to wait for the next line, `asked TIMES` how often this
            process was asked to stop, `stuck SECONDS` is the last.
        every_s: seconds between two signs.
        silence_s: seconds beyond that after which this process may be taken for stopped, once `begin` was called.
        start_s: the same before, for the import of a large library may block every thread; and at the end.
        stuck_s: seconds in which nothing was done, after which it says that it is stuck; before `begin` so many more as
            `start_s`, for machines and room in the cluster are waited for without a sound.
    """

    def __init__(self, line: int, every_s: float, silence_s: float, start_s: float, stuck_s: float) -> None:
        self.every_s, self.stuck_s = every_s, stuck_s
        self._line = line
        self._patience = every_s + silence_s
        self._longer = max(self._patience, start_s)
        self._began = False
        self._over = threading.Event()

    def start(self) -> None:
        self.say("alive", self._longer)
        threading.Thread(target=self._give, name="pulse", daemon=True).start()

    def begin(self) -> None:
        """Everything is loaded."""
        self._began = True
        self.say("alive", self._patience)

    def end(self) -> None:
        self._over.set()
        self.say("alive", self._longer)

    def _give(self) -> None:
        done, since = (_beats, computed_s()), time.monotonic()
        looked = since
        while not self._over.wait(self.every_s):
            before, looked = looked, time.monotonic()
            since += max(0.0, looked - before - self.every_s)  # all of this process was stopped, this thread, too
            now, still = (_beats, computed_s()), looked - since
            if now[0] != done[0] or now[1] - done[1] > LEAST_SHARE * still:
                done, since = now, looked
            elif still > (self.stuck_s if self._began else self.stuck_s + self._longer):
                faulthandler.dump_traceback(all_threads=True)  # where each of them waits
                return self.say("stuck", still)
            self.say("alive", self._patience if self._began else self._longer)

    def say(self, word: str, number: float) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(self._line, f"{word} {number:g}\n".encode())


_pulse: Pulse | None = None


def begin() -> None:
    """The steps begin: from here on nothing large is imported."""
    if _pulse is not None:
        _pulse.begin()


def asked_to_stop(times: int) -> None:
    """Whoever has signalled every process of a job has also told the one that watches, which need not pass it on."""
    if _pulse is not None:
        _pulse.say("asked", times)


@contextlib.contextmanager
def given(every_s: float, silence_s: float, start_s: float, stuck_s: float) -> Iterator[None]:
    """Signs of life inside, if this process was started by one that listens for them."""
    global _pulse
    line = os.environ.pop(VARIABLE, None)  # nobody that this process starts shall write there
    if line is None:
        yield
        return
    os.set_inheritable(int(line), False)
    _pulse = Pulse(int(line), every_s, silence_s, start_s, stuck_s)
    _pulse.start()
    try:
        yield
    finally:
        _pulse.end()
        _pulse = None


def computed_s() -> float:
    """CPU seconds that the run has used in this process. With Ray those of the main thread, for Ray's own are never
    idle; the other threads of a run wait for calls there."""
    if "ray" in sys.modules:
        with contextlib.suppress(OSError):  # no Linux
            with open(f"/proc/self/task/{os.getpid()}/stat", encoding="ascii", errors="replace") as file:
                user, system = file.read().rpartition(")")[2].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return time.process_time()
