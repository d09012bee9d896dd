"""Under REQUIRE_ALL, which continuous integration sets, a skipped test or file is a failure."""

import subprocess
import sys

import pytest

SKIPPING = """
import pytest
{module}
def test_one():
    {body}

@pytest.mark.xfail
def test_two():
    assert False
"""


@pytest.mark.slow
@pytest.mark.parametrize(("module", "body", "expected"), [
    ("", "pytest.skip('no such thing here')", "1 failed, 1 xfailed"),
    ("pytest.skip('not installed', allow_module_level=True)", "pass", "1 error"),
    ("", "pytest.skip('the external sample data is not here')", "1 skipped, 1 xfailed"),
    ("", "pass", "1 passed, 1 xfailed"),
])  # fmt: skip
def test_a_skip_fails(tmp_path, repo_root, module, body, expected):
    (tmp_path / "test_it.py").write_text(SKIPPING.format(module=module, body=body))
    (tmp_path / "conftest.py").write_text((repo_root / "tests" / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {"REQUIRE_ALL": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert expected in done.stdout, done.stdout
