"""Files that come with this package, by name: `shipped:reviews.train.jsonl` wherever the command is given.

In a checkout they lie in configs/; a wheel carries a copy inside the package. So a config that names its rows in this
way reads them from any working directory, and on another machine too.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from rlhf_ray.errors import DataError

PREFIX = "shipped:"


def shipped_config(name: str) -> Path:
    """A file of configs/ in a checkout, or its copy that is installed with the package."""
    return _folder() / name


def shipped_rows(source: str) -> Path:
    """The file behind `shipped:<name>`. Raises DataError, which lists the names, where there is none."""
    name, folder = source.removeprefix(PREFIX), _folder() / "data"
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"there are {', '.join(names)}"
        raise DataError(f"{source}: no rows of this name come with the package; {hint}")
    return folder / name


def _folder() -> Path:
    package = Path(str(resources.files("rlhf_ray")))
    checkout = package.parent / "configs"
    # By a file of its own: beside an installed package, any folder may be called configs.
    return checkout if (checkout / "grpo_arithmetic.yaml").is_file() else package / "configs"
