"""Generators that are lost where they hold half of something: runs end with the weights of undisturbed ones."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from rlhf_ray.start.rl import run_rl
from tests.remote.test_faults import require_no_actors

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), pytest.mark.usefixtures("own_ray")]

# A generator that is struck in the calls for which a file lies beside it: "METHOD-VERSION", with a signal's number. It
# holds that version then; the first that comes takes the file.
STRUCK = """
import os, signal
from pathlib import Path
from rlhf_ray.roles import factory

HERE = Path(__file__).parent / "strikes"

def strike(method, version):
    wanted = HERE / f"{method}-{version}"
    taken = HERE / f"taken-{method}-{version}-{os.getpid()}"
    try:
        wanted.rename(taken)
    except OSError:
        return
    os.kill(os.getpid(), int(taken.read_text()))

def make(settings, assets, use):
    made = getattr(factory, (HERE / "maker").read_text())(settings, assets, use)
    kind = type(made)

    def struck(method):
        def call(self, *args, **kwargs):
            if method == "finish_weight_update":
                strike(method, self.version)
            result = getattr(kind, method)(self, *args, **kwargs)
            strike(method, self.version)
            return result
        return call

    methods = "start_weight_update update_weights finish_weight_update logprobs sleep wake".split()
    made.__class__ = type(kind.__name__, (kind,), {method: struck(method) for method in methods})
    return made
"""


@pytest.fixture
def engine(tmp_path):
    """`engine(maker, {"update_weights-2": SIGKILL})`: the setting of a generator that is struck so."""

    def make(maker: str, strikes: dict[str, int]) -> str:
        (tmp_path / "strikes").mkdir()
        (tmp_path / "strikes" / "maker").write_text(maker)
        (tmp_path / "struck.py").write_text(STRUCK)
        for name, sign in strikes.items():
            (tmp_path / "strikes" / name).write_text(str(int(sign)))
        return f"generator.engine={tmp_path}/struck.py:make"

    return make


def weights_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def events_of(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def require_all_struck(folder: Path, strikes: dict[str, int]) -> None:
    taken = [path.name.removeprefix("taken-").rpartition("-")[0] for path in (folder / "strikes").glob("taken-*")]
    assert sorted(taken) == sorted(strikes)


# One is stopped, not killed: the learner waits for its answer until the driver ends it.
STRIKES = {
    "update_weights-1": signal.SIGSTOP,
    "finish_weight_update-2": signal.SIGKILL,
    "logprobs-4": signal.SIGKILL,
}
TWO = ("executor=ray", "generator.count=2", "ray.restarts=9", "ray.pulse_s=2", "ray.silence_s=15")


def test_lost_in_a_weight_sync_or_the_canary_behind_it(tiny_config, tmp_path, engine):
    options = ("steps=5", "eval.size=2")
    run_rl(tiny_config(*options), tmp_path / "calm")
    setting = engine("make_hf_generator", STRIKES)
    run_rl(tiny_config(*TWO, setting, *options), tmp_path / "run")
    require_all_struck(tmp_path, STRIKES)
    assert weights_of(tmp_path / "calm") == weights_of(tmp_path / "run"), "bit for bit"
    assert len(events_of(tmp_path / "run", "worker_lost")) == len(STRIKES)
    require_no_actors()


def test_lost_while_generation_overlaps_with_learning(tiny_config, tmp_path, engine, strikes):
    """While the learner is in the midst of a step, and in a weight sync: each step is still written with the version
    that it is due to, every prompt is learned from once, and the books are closed."""
    options = ("steps=5", "eval.size=2", "rollout.max_staleness=1", "algorithm.correction=truncate")
    in_sync = {"update_weights-2": signal.SIGKILL}
    setting = engine("make_hf_generator", in_sync)
    calls = {("learner rank 0", "learn"): (2, "generator 0")}
    struck = strikes(calls)
    run_rl(tiny_config(*TWO, setting, *options), tmp_path / "run")
    require_all_struck(tmp_path, in_sync)
    assert sorted(struck) == sorted(map(" ".join, calls))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["staleness/mean"], row["staleness/max"]) for row in rows] == [(0, 0), *[(1, 1)] * 4]
    assert all(row["sync/canary_absdiff"] < 1e-5 for row in rows)
    last = rows[-1]
    assert last["ledger/sampled"] == last["ledger/learned"] == 5 * 24 and last["ledger/open"] == 0
    require_no_actors()
