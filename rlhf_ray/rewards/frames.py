"""Where in the user's own files an exception came about."""

from __future__ import annotations

import site
import sysconfig
import traceback
from pathlib import Path
from typing import Literal

# The innermost ones: a recursion without end has a thousand.
_MOST = 5

_OURS = Path(__file__).resolve().parent.parent


def frames_of_users(error: BaseException) -> tuple[str, ...]:
    """`path:line in function: source line` of each call in a file that is neither ours nor a library's.

    The innermost call last; of more than five, those that are nearest to the exception. A function that is itself part
    of an installed library shows that library's calls. A file that could not be compiled was never called: its own
    place is the last line.
    """
    frames = [(frame, _whose(frame.filename)) for frame in traceback.extract_tb(error.__traceback__)]
    users = [frame for frame, whose in frames if whose == "user"]
    users = users or [frame for frame, whose in frames if whose == "installed"]
    lines = [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in users]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append(f"{error.filename}:{error.lineno}: {(error.text or '').strip()}")
    left_out = len(lines) - _MOST
    return tuple(lines if left_out <= 0 else [f"({left_out} outer calls are not shown)", *lines[-_MOST:]])


def _whose(file: str) -> Literal["ours", "installed", "standard", "user"]:
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
