from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlhf_ray.models.threads import WAITING, wait_briefly

SHORT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize(("before", "after"), [
    ({}, SHORT),
    ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "1"}),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
])  # fmt: skip
def test_threads_wait_briefly_unless_the_user_has_said_how(before, after):
    environment = dict(before)
    wait_briefly(environment)
    assert environment == after


def test_every_command_waits_so_before_it_imports_torch():
    code = """
import sys
from rlhf_ray import cli
def command():
    import os
    assert "torch" not in sys.modules
    print(os.environ["GOMP_SPINCOUNT"], os.environ["KMP_BLOCKTIME"])
cli.app = command
cli.main()
"""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000", "1"]
