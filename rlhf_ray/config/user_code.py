"""What people write themselves and name in a config: `package.module:name`, or `path/to/file.py:name`.

Rewards, losses, advantages, engines and observers are all found here. On Ray each worker looks again, on its own
machine: a module must be installed there, and a file must lie at the same path.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from rlhf_ray.config.given import value_of, was_given
from rlhf_ray.config.user_frames import frames_of_users
from rlhf_ray.config.user_paths import is_file, typed_path
from rlhf_ray.errors import ConfigError


def is_place(name: str) -> bool:
    """Whether a name says where something is; else it is the name of something that is built in."""
    return ":" in name


def find(place: str, kind: str) -> Any:
    """What stands at `place`, or the object itself that a Python program has given for it.

    Args:
        kind: what it is to be, for people: "reward", "loss", ...
    Raises:
        ConfigError: there is nothing, or its module cannot be imported.
    """
    given = value_of(place)
    if given is not None:
        return given
    if was_given(place):
        raise ConfigError(
            f"{kind} {place!r} was given from Python and is in no file; give it again from Python, or put it into a "
            "file and name it file.py:function"
        )
    where, _, attribute = place.rpartition(":")
    module = _import_file(where, kind) if where.endswith(".py") else _import_module(where, kind)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; check the spelling"
        raise ConfigError(f"{kind} {place!r}: {where} has no {attribute!r}{hint}") from error


def _import_module(name: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's module does while it is imported
        said = (
            f"{kind} module {name!r} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or give a path that ends in .py"
        )
        raise ConfigError("\n  ".join([said, *frames_of_users(error)])) from error


def _import_file(place: str, kind: str) -> ModuleType:
    path = typed_path(place)
    if not is_file(path):
        raise ConfigError(f"{kind} file {place} does not exist; give the path of a .py file")
    path = path.resolve()
    # A name of its own, so that two files called mine.py do not collide; the same file loads once.
    name = f"rlhf_ray_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        said = f"{kind} file {place} cannot be run ({type(error).__name__}: {error}); mend it"
        raise ConfigError("\n  ".join([said, *frames_of_users(error)])) from error
    return module
