"""Sandboxed processes that answer one question after the other: the sample's, and the one in which tests run."""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import marshal
import os
import selectors
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from io import FileIO
from typing import Any

from rlhf_ray.rewards.sandbox import Limits, Started, started

_PACKAGE = "rlhf_ray.rewards."
_SAMPLE = ("code_wire", "code_seeds", "code_sample")
_JUDGE = ("code_wire", "code_seeds", "code_changes", "code_remote", "code_peer", "code_judge")
_STDERR_KEPT = 2000
_TICK = 0.05


class Ended(Exception):
    """The process answers no more; says why."""


class SandboxSession:
    """One question at a time to a process that reads and writes a JSON object a line."""

    def __init__(self, running: Started, beside: Sequence[Started], reading: int, writing: int, limits: Limits) -> None:
        self.running, self.limits = running, limits
        self._reading, self._writing = reading, writing
        self._all = [running, *beside]
        self._said = bytearray()
        self._rest = bytearray()
        os.set_blocking(writing, False)

    def ask(self, question: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        """Its answer; without a question, what it says by itself.

        Raises:
            Ended: it is gone, did not answer in time, or not with a JSON object of bounded size.
        """
        deadline = time.monotonic() + seconds
        left = memoryview(b"" if question is None else json.dumps(question).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(self._reading, selectors.EVENT_READ)
            for each in self._all:
                if not each.process.stderr.closed:
                    selector.register(each.process.stderr, selectors.EVENT_READ)
            if left:
                selector.register(self._writing, selectors.EVENT_WRITE)
            looked = time.monotonic()
            while True:
                for key, _ in selector.select(_TICK):
                    if key.fileobj == self._writing:
                        left = self._write(left)
                        if not left:
                            selector.unregister(self._writing)
                    elif key.fileobj == self._reading:
                        if (answer := self._read()) is not None:
                            return answer
                    else:
                        self._drain(key.fileobj, selector)
                now = time.monotonic()
                if now > deadline:
                    raise Ended(f"did not end within {seconds:g} s")
                if now - looked > _TICK:
                    looked = now
                    if any(each.watch.too_many() for each in self._all):
                        raise Ended("started too many processes")

    def _write(self, left: memoryview) -> memoryview:
        try:
            return left[os.write(self._writing, left) :]
        except BlockingIOError:
            return left
        except BrokenPipeError:
            return left[:0]  # the end of what it says will tell

    def _read(self) -> dict[str, Any] | None:
        chunk = os.read(self._reading, 1 << 16)
        if not chunk:
            raise Ended(self._last_words())
        line, end, rest = chunk.partition(b"\n")
        self._rest += line
        if len(self._rest) > self.limits.reply_mb << 20:
            raise Ended(f"answered with more than {self.limits.reply_mb} MB")
        if not end:
            return None
        line, self._rest = bytes(self._rest), bytearray(rest)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise Ended("did not answer in the agreed form") from None
        if not isinstance(answer, dict):
            raise Ended("did not answer in the agreed form")
        return answer

    def _drain(self, stderr: Any, selector: selectors.BaseSelector) -> None:
        """What a sample writes there is nobody's, but a process that does not start says why."""
        chunk = os.read(stderr.fileno(), 1 << 16)
        self._said = (self._said + chunk)[-_STDERR_KEPT:]
        if not chunk:
            selector.unregister(stderr)

    def _last_words(self) -> str:
        try:
            status = self.running.process.wait(1)
        except Exception:
            status = None  # it has only closed its pipes
        return self._said.decode("utf-8", "replace").strip() or f"ended early, with exit status {status}"


@contextmanager
def sample_session(
    program: str, *, limits: Limits, tier: str | None, calls: int, leetcode: bool
) -> Iterator[SandboxSession]:
    """A process with the sample's code, to be asked for the values of its functions."""
    with ExitStack() as stack:
        job = {"program": program, "leetcode": leetcode, "outside": []}
        yield _session(stack, _SAMPLE, job, [], limits, tier, calls)


@contextmanager
def judge_session(
    program: str, about_tests: Mapping[str, Any], *, limits: Limits, tier: str | None, calls: int, leetcode: bool
) -> Iterator[SandboxSession]:
    """A process that runs tests, joined by two pipes to another one that has the sample's code."""
    with ExitStack() as stack:
        (asked, asking), (answered, answering) = _pipe(stack), _pipe(stack)
        job = {"program": program, "leetcode": leetcode, "outside": about_tests["outside"], "reading": asked.fileno(),
               "writing": answering.fileno()}  # fmt: skip
        sample = stack.enter_context(_started(_SAMPLE, job, [asked, answering], limits, tier, calls))
        job = {**about_tests, "sample_reading": answered.fileno(), "sample_writing": asking.fileno()}
        session = _session(stack, _JUDGE, job, [answered, asking], limits, tier, calls, beside=[sample])
        for end in (asked, asking, answered, answering):
            end.close()  # theirs alone: the end of one is then seen by the other
        yield session


def _session(
    stack: ExitStack, modules: tuple[str, ...], job: dict, pipes: list[FileIO], limits: Limits, tier: str | None,
    calls: int, beside: Sequence[Started] = (),
) -> SandboxSession:  # fmt: skip
    (question_end, writing), (reading, answer_end) = _pipe(stack), _pipe(stack)
    job = {**job, "reading": question_end.fileno(), "writing": answer_end.fileno()}
    ends = [question_end, answer_end]
    running = stack.enter_context(_started(modules, job, [*ends, *pipes], limits, tier, calls))
    for end in ends:
        end.close()
    return SandboxSession(running, beside, reading.fileno(), writing.fileno(), limits)


def _started(
    modules: tuple[str, ...], job: dict, pipes: list[FileIO], limits: Limits, tier: str | None, calls: int
) -> AbstractContextManager[Started]:
    code = [[_PACKAGE + name, _code(name)] for name in modules]
    job = {**job, "modules": code, "pipes": [pipe.fileno() for pipe in pipes]}
    return started(job, limits=limits, tier=tier, seconds=limits.seconds * (calls + 1))


def _pipe(stack: ExitStack) -> tuple[FileIO, FileIO]:
    reading, writing = os.pipe()
    # Objects, not numbers: closing one twice must not close what another thread has opened meanwhile.
    return stack.enter_context(FileIO(reading, "rb")), stack.enter_context(FileIO(writing, "wb"))


@functools.cache
def _code(module: str) -> str:
    """Compiled here once: compiling it anew in every process would take longer than most samples do."""
    spec = importlib.util.find_spec(_PACKAGE + module)
    return base64.b64encode(marshal.dumps(spec.loader.get_code(spec.name))).decode()
