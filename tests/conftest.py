"""What every test gets: one thread a process, no network, an order, a time limit, and the outside data.

Marks: none (quick: all of them together take under a minute), `slow` (trains something), `engine`
(starts vLLM, DeepSpeed or Ray), `system` (runs a real command). They run in that order, so that a
simple mistake shows first.

No test asserts a time, for on a busy machine everything takes longer: what costs seconds is measured by
`make bench`. The time limits end a test that hangs; they are many times what it takes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

# Before anything imports torch: with a thread pool per process, several processes on few cores run ten times
# slower, and sums in another order break comparisons to the last bit.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests make their own models; one that reaches for the Hub is wrong, and should say so at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

import pytest  # noqa: E402

# When logging is configured anew, as vLLM and uvicorn do, absl (it comes with tensorboard) closes the stream it writes
# to unless that is standard error: under pytest it would be the file into which all output of a test goes.
with contextlib.suppress(ImportError):
    from absl.logging import get_absl_handler

    get_absl_handler().python_handler.stream = sys.__stderr__

ROOT = Path(__file__).resolve().parent.parent

# In running order: mark -> (what it means, seconds after which a test hangs unless it says otherwise)
GROUPS = {
    "quick": ("no mark: pure functions and small objects", 120),
    "slow": ("trains or runs something for more than a second or two", 900),
    "engine": ("starts vLLM, DeepSpeed or Ray", 900),
    "system": ("runs a real command as a user would", 1800),
}


def group_of(item: pytest.Item) -> str:
    for mark in reversed(GROUPS):
        if item.get_closest_marker(mark):
            return mark
    return "quick"


def pytest_configure(config: pytest.Config) -> None:
    for mark, (meaning, _) in GROUPS.items():
        if mark != "quick":
            config.addinivalue_line("markers", f"{mark}: {meaning}")
    # What a shell starts in the background ignores ctrl-C, and so would every command that the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def allowed(item: pytest.Item) -> float:
    """Seconds after which a test hangs."""
    return item.get_closest_marker("timeout").args[0]


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(GROUPS)
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: an address is another in each process; give the parameters ids")
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(GROUPS[group_of(item)][1]))
        # Side by side (`-n 2 --dist loadgroup`), a file's tests of one group stay together and share their engine.
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(f"{group_of(item)}-{item.path.relative_to(ROOT)}"))
    # Stable: file order inside a group; but the longest command first, so that no process waits for another's last.
    items.sort(key=lambda item: (order.index(group_of(item)), -allowed(item) if group_of(item) == "system" else 0))


_spent: dict[str, float] = defaultdict(float)
_tests: dict[str, set[str]] = defaultdict(set)


# Set by continuous integration: a test that is skipped there proves nothing anywhere.
REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"
# What no machine has as it is, or what is not part of the project.
MAY_BE_SKIPPED = ("root is refused this tier", "the external sample data")


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a failure of a skip."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if report.skipped and not hasattr(report, "wasxfail") and not any(known in reason for known in MAY_BE_SKIPPED):
        report.outcome, report.longrepr = "failed", f"{reason}; REQUIRE_ALL is set, so no test may be skipped"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    outcome = yield
    report = outcome.get_result()
    report.group = group_of(item)  # travels with the report, also from another process
    if REQUIRE_ALL:
        refuse_skip(report)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report():
    outcome = yield
    if REQUIRE_ALL:
        refuse_skip(outcome.get_result())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    group = getattr(report, "group", "quick")  # a crashed process has told nothing
    _spent[group] += report.duration
    _tests[group].add(report.nodeid)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section("time by group, summed over processes")
    for group in GROUPS:
        if _tests[group]:
            terminalreporter.write_line(f"{group:<8} {len(_tests[group]):>5} tests {_spent[group]:>9.1f} s")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real samples that lie beside the checkout and are not part of the project (reviews, GSM8K, HH)."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the external sample data (../shared/data) is not on this machine")
    return folder


RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_rank_is_left_behind():
    """A DeepSpeed engine in this process names its rank in the environment; no later test or command inherits it."""
    before = {name: os.environ.get(name) for name in RANK_NAMES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def tiny_tree() -> dict[str, Any]:
    """The settings of a run of one step, which takes a second."""
    return {
        "name": "tiny",
        "steps": 1,
        "device": "cpu",
        "model": {
            "path": "scratch:qwen2",
            "tokenizer": {"path": "scratch:char"},
            "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 32},
        },
        "data": {"path": "task:arithmetic", "max_prompt_tokens": 16, "eval_size": 2},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 2},
        "rewards": [{"function": "repetition_penalty"}],
        "eval": {"size": 2},
        "logging": {"loggers": []},
    }


@pytest.fixture
def rlhf_ray(monkeypatch, capsys):
    """Run a command in this process, with a text on its stdin: (exit status, stdout, stderr). tests/system has its own,
    in a process of its own."""
    from rlhf_ray import cli

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf-ray", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def simulated_hosts(tmp_path):
    """`simulated_hosts(2, own=[...])`: as many machines, each in namespaces of its own; gone after the test."""
    from cluster.simulate import simulated, why_not

    problem = why_not()
    if problem:
        pytest.skip(f"several hosts cannot be simulated: {problem}")
    with contextlib.ExitStack() as stack:
        yield lambda count, **options: stack.enter_context(simulated(tmp_path / "hosts", count, **options))


@pytest.fixture(scope="session")
def script():
    """A script that lies outside the package as a module, by its path: `script("docs/make_map.py")`."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
