"""What the tests of cluster/ start things with."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from tests.cluster import toy_slurm

THIS = f"#!/bin/sh\nexec {sys.executable} -m {{}} \"$@\"\n"


@pytest.fixture
def commands(tmp_path) -> Callable[..., str]:
    """`commands(ray, rlhf_ray)`: a PATH on which these two scripts come first; without any, the real ones do."""

    def make(ray: str = THIS.format("ray.scripts.scripts"), rlhf_ray: str = THIS.format("rlhf_ray.cli")) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in (("ray", ray), ("rlhf-ray", rlhf_ray)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return f"{folder}:{toy_slurm.PATH}"

    return make
