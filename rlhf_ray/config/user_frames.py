"""Where in the user's own files an exception came about."""

from __future__ import annotations

import re
import site
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

# The innermost ones: a recursion without end has a thousand.
_MOST = 5

# What process pools raise exceptions of their workers from.
_OTHER_PROCESS = ("_RemoteTraceback", "RemoteTraceback")

Whose = Literal["ours", "installed", "standard", "user"]

_OURS = Path(__file__).resolve().parent.parent


def frames_of_users(error: BaseException) -> tuple[str, ...]:
    """`path:line in function: source line` of each call in a file that is neither ours nor a library's.

    The innermost call last; of more than five, those that are nearest to the exception. A function that is itself part
    of an installed library shows that library's calls. A file that could not be compiled was never called: its own
    place is the last line. Below stand the exceptions that led to this one, with their own calls: what it was raised
    from or came about in, and the members of a group (`asyncio.TaskGroup`).
    """
    lines, seen = _calls(error), {id(error)}
    waiting = _behind(error)
    while waiting and len(seen) <= _MOST:
        how, before = waiting.pop(0)
        if id(before) not in seen:  # an exception may be its own cause by a long way round
            seen.add(id(before))
            waiting = [*_behind(before), *waiting]
            if type(before).__name__ in _OTHER_PROCESS:
                lines += _calls_in_text(str(before))
            else:
                lines += [f"{how} {type(before).__name__}: {before}", *_calls(before, whose=("user",))]
    return tuple(lines)


def _calls(error: BaseException, whose: Sequence[Whose] = ("user", "installed")) -> list[str]:
    """Those in files of the first of `whose` that has any."""
    frames = [(frame, _whose(frame.filename)) for frame in traceback.extract_tb(error.__traceback__)]
    chosen = next((found for one in whose if (found := [frame for frame, of in frames if of == one])), [])
    lines = [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in chosen]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append(f"{error.filename}:{error.lineno}: {(error.text or '').strip()}")
    left_out = len(lines) - _MOST
    return lines if left_out <= 0 else [f"({left_out} outer calls are not shown)", *lines[-_MOST:]]


def _behind(error: BaseException) -> list[tuple[str, BaseException]]:
    """The exceptions that led to it, each with how."""
    # Python 3.10 has groups only from a library, of a class of its own.
    members = getattr(error, "exceptions", ())
    found = [("in the group", member) for member in members if isinstance(member, BaseException)]
    if error.__cause__ is not None:
        found.append(("caused by", error.__cause__))
    elif error.__context__ is not None and not error.__suppress_context__:
        found.append(("while handling", error.__context__))
    return found


def _calls_in_text(text: str) -> list[str]:
    """The calls of a traceback that came out of a process pool, where it is a text."""
    found = re.findall(r'^  File "(.+)", line (\d+), in (.+)\n    (.+)$', text, re.MULTILINE)
    lines = [f"{file}:{line} in {name}: {source}" for file, line, name, source in found if _whose(file) == "user"]
    return lines[-_MOST:]


def _whose(file: str) -> Whose:
    path = Path(file).resolve()
    if path.is_relative_to(_OURS):
        return "ours"
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if any(path.is_relative_to(Path(folder).resolve()) for folder in [*installed, site.getusersitepackages()]):
        return "installed"
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    if file.startswith("<") or any(path.is_relative_to(Path(folder).resolve()) for folder in standard):
        return "standard"
    return "user"
