"""The kill matrix and the soak: which cells share a run, when a strike is due, and what would be found wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections import Counter

import pytest

from benchmarks.chaos.cells import CELLS, FAILED, PASSED, UNCLEAR, Cell, chosen, latest, markdown, packs, places, row_of
from benchmarks.chaos.monkey import VICTIMS, strikes_of
from benchmarks.chaos.runs import Struck, differences, merged, open_books

WRITING = Cell("generator(hf)", "generating", "SIGKILL")


# ---- cells --------------------------------------------------------------------------------------------------------


def test_every_victim_is_struck_in_every_phase_by_both_signals():
    assert len(CELLS) == len(set(CELLS)) == 8 * 5 * 2
    assert [c.name for c in chosen(["reward", "SIGSTOP", "syncing"])] == ["reward/syncing/SIGSTOP"]
    assert chosen(["driver", "reward"]) == [cell for cell in CELLS if cell.victim in ("driver", "reward")]
    assert chosen([WRITING.name]) == [WRITING]
    with pytest.raises(SystemExit, match="rewards"):
        chosen(["rewards"])


def test_runs_are_shared_and_what_has_not_passed_runs_alone():
    failed = {WRITING.name: {"outcome": UNCLEAR}}
    found = list(packs(CELLS, failed, together=5))
    assert Counter(cell for pack in found for cell in pack) == Counter(CELLS), "each cell once"
    assert [WRITING] in found
    assert max(map(len, found)) == 5 and sum(map(len, found)) / len(found) > 4
    assert all(len({cell.engine for cell in pack}) == 1 for pack in found)
    assert len({cell.victim for cell in found[0]}) == 5
    assert list(packs([WRITING], {WRITING.name: {"outcome": PASSED}}, together=5)) == [[WRITING]]


def test_one_is_struck_in_each_step_and_checkpoints_where_there_is_one():
    writing, saving = WRITING, Cell("reward", "checkpointing", "SIGKILL")
    assert places([writing, writing, saving, writing, saving, saving], every=2) == [2, 3, 4, 5, 6, 8]
    assert places([saving, saving], every=3) == [3, 6]


# ---- what a run says of a cell --------------------------------------------------------------------------------------


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def struck(tmp_path):
    """A run whose generator 1 was killed at second 10 of 1970, in the midst of a step that it ends at second 16."""

    def make(events=("worker_lost", "worker_restarted"), doing=("generating",), pid=7, seat="generator 1"):
        words = {
            "id": WRITING.name.replace("/", " "), "seat": seat, "pid": 7, "phase": "generating", "step": 3,
            "doing": list(doing), "call": "write", "after_ms": 5.0, "time": 10.0,
        }  # fmt: skip
        seconds = {"worker_lost": 11, "worker_restarted": 14, "restarted": 13, "rewound": 15}
        lines(tmp_path / "chaos" / "strikes.jsonl", [words])
        lines(tmp_path / "run" / "events.jsonl", [
            {"time": f"1970-01-01T00:00:{seconds[kind]:02}+00:00", "event": kind,
             **({"worker": seat, "reason": f"{seat} (node n, pid {pid}) died"} if kind.startswith("worker") else {})}
            for kind in events
        ])  # fmt: skip
        lines(tmp_path / "chaos" / "phases.jsonl", [
            {"time": 10.5, "step": 3, "phase": "generating", "what": "broken off"},
            {"time": 15.0, "step": 3, "phase": "loop", "what": "step"},
            {"time": 16.0, "step": 3, "phase": "generating", "what": "end"},
        ])  # fmt: skip
        return Struck(tmp_path, 0, 20.0, ())

    return make


def test_seconds_are_split_into_detection_start_and_replay(struck):
    row = row_of(WRITING, struck(), [], alone=False)
    assert row["outcome"] == PASSED and row["remedy"] == "replaced"
    assert (row["detect_s"], row["start_s"], row["replay_s"]) == (1.0, 3.0, 2.0)
    row = row_of(WRITING, struck(["worker_lost", "restarted"]), [], alone=False)
    assert row["remedy"] == "run started again" and (row["start_s"], row["replay_s"]) == (4.0, 1.0)
    row = row_of(WRITING, struck(["worker_lost", "worker_restarted", "rewound"]), [], alone=False)
    assert row["remedy"] == "replaced, and back to the checkpoint"


def test_any_rank_may_be_named_for_its_group(struck):
    run = struck(seat="learner rank 1")
    events = run.folder / "run" / "events.jsonl"
    events.write_text(events.read_text().replace("learner rank 1", "learner rank 0"))
    row = row_of(WRITING, run, [], alone=True)
    assert row["outcome"] == PASSED and row["detect_s"] == 1.0
    events.write_text(events.read_text().replace("learner rank 0", "critic rank 0"))
    assert row_of(WRITING, run, [], alone=True)["outcome"] == FAILED


@pytest.mark.parametrize(("made", "why"), [
    ({"events": []}, "nobody noticed it"),
    ({"doing": ["scoring"]}, "the run was .'scoring'. when it was struck"),
    ({"pid": 8}, "another process than 7"),
])  # fmt: skip
def test_a_cell_whose_log_does_not_prove_it_has_not_passed(struck, made, why):
    assert row_of(WRITING, struck(**made), [], alone=True)["outcome"] == FAILED
    assert re.search(why, row_of(WRITING, struck(**made), [], alone=True)["why"])


def test_the_runs_problems_are_the_cells(struck):
    assert row_of(WRITING, struck(), ["exit status 75"], alone=False)["outcome"] == UNCLEAR, "another may be guilty"
    assert row_of(WRITING, struck(), ["exit status 75"], alone=True)["outcome"] == FAILED
    other = Cell("reward", "scoring", "SIGKILL")
    assert row_of(other, struck(), [], alone=False) is None, "not reached: it is still to be run"
    assert "not struck" in row_of(other, struck(), [], alone=True)["why"]


def test_the_table_has_the_last_row_of_each_cell():
    row = {"cell": WRITING.name, "outcome": PASSED, "detect_s": 1.0, "start_s": 3.0, "replay_s": 2.0, "remedy": "x"}
    hung = {**row, "cell": "driver/syncing/SIGSTOP", "outcome": FAILED}
    table = markdown(latest([{**row, "outcome": FAILED}, row, hung]))
    killed, stopped = table.split("SIGSTOP:")
    assert f"| generator(hf) | 1.0 + 3.0 + 2.0 |{' not run |' * 4} x |" in killed
    assert f"| driver |{' not run |' * 3} **failed** 1.0 + 3.0 + 2.0 | not run | x |" in stopped


# ---- what is compared ----------------------------------------------------------------------------------------------


def write_run(folder, *, weights=b"w", prompts=((0, 1), (2, 3)), loss=0.5, **ledger):
    (folder / "run" / "model").mkdir(parents=True)
    (folder / "run" / "model" / "model.safetensors").write_bytes(weights)
    books = dict.fromkeys(("stale", "filtered", "failed", "baseline", "lost", "open"), 0.0)
    books |= {"sampled": 4.0, "learned": 4.0} | ledger
    row = {f"ledger/{name}{unit}": count for name, count in books.items() for unit in ("", "_tokens")}
    lines(folder / "run" / "metrics.jsonl", [{"step": 1, "loss": loss, "time/step": os.times().elapsed, **row}])
    for step, positions in enumerate(prompts, start=1):
        rows = [{"prompt_id": position, "completion": "a"} for position in positions]
        lines(folder / "run" / "rollouts" / f"step_{step}.jsonl", rows)
    return folder


def test_a_struck_run_must_be_the_undisturbed_one(tmp_path):
    calm = write_run(tmp_path / "calm")
    assert not list(differences(calm, write_run(tmp_path / "same", lost=2.0, sampled=6.0)))
    for name, change, said in (
        ("weights", {"weights": b"v"}, "weights"), ("prompts", {"prompts": ((0, 1), (2, 2))}, "prompts"),
        ("loss", {"loss": 0.5000001}, "step 1: loss"),
    ):  # fmt: skip
        assert said in " ".join(differences(calm, write_run(tmp_path / name, **change)))
    (tmp_path / "none").mkdir()
    assert "no weights" in " ".join(differences(calm, tmp_path / "none"))


def test_the_books_of_an_overlapped_run_must_be_closed(tmp_path):
    assert not list(open_books(write_run(tmp_path / "good"), 1))
    for name, change, said in (
        ("twice", {"prompts": ((0, 1), (1, 2))}, "twice"), ("gone", {"sampled": 5.0}, "5 sampled, and 4"),
        ("open", {"sampled": 5.0, "open": 1.0}, "1 answers are open"), ("fewer", {"prompts": ((0, 1),)}, "has 2"),
    ):  # fmt: skip
        assert said in " ".join(open_books(write_run(tmp_path / name, **change), 1))


def test_sections_are_merged():
    both = merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}})
    assert both == {"a": {"b": 4, "c": 2}, "d": {"e": 5}}


def test_a_seed_draws_the_same_kills(tmp_path):
    strikes = strikes_of(1, 100, 50)
    assert strikes == strikes_of(1, 100, 50) != strikes_of(2, 100, 50)
    assert {strike.victim for strike in strikes} == set(VICTIMS) and len({strike.phase for strike in strikes}) == 5
    assert [strike.step for strike in strikes] == sorted(strike.step for strike in strikes)
    assert len({strike.id for strike in strikes}) == 100 and strikes[-1].step < 50


# ---- the striker ----------------------------------------------------------------------------------------------------


@pytest.fixture
def striker(script, tmp_path, monkeypatch):
    """The module as it is in a process that is called `generator 1`, with a plan."""
    module = script("benchmarks/striker/sitecustomize.py")
    plan = [{"id": "a", "victim": "generator", "phase": "generating", "step": 2, "signal": "SIGSTOP", "after_ms": 1}]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "struck").mkdir()
    monkeypatch.setattr(module, "OUT", str(tmp_path))
    monkeypatch.setattr(module, "seat", "generator 1")
    return module


def test_a_call_is_struck_in_its_phase_and_once(striker, tmp_path, monkeypatch):
    ended, killed = [], []
    monkeypatch.setattr(striker.os, "kill", lambda pid, number: killed.append((pid, number)))

    def write(self):
        ended.append(self)
        return "answer"

    call = striker.struck_within(write)
    striker.doing.clear()
    for step, phases in ((1, {"generating": 1}), (2, {"updating": 1})):
        striker.rounds, striker.doing = step, phases
        striker.say("x", "begin")
        assert call(0) == "answer" and not killed, "too early, or another phase"
    striker.rounds, striker.doing = 3, {"generating": 1}
    striker.say("generating", "begin")
    assert call(1) == call(2) == "answer" and ended == [0, 0, 1, 2]
    assert killed == [(os.getpid(), signal.SIGSTOP)], "once, whoever is started again"
    [words] = [json.loads(line) for line in (tmp_path / "strikes.jsonl").read_text().splitlines()]
    assert (words["seat"], words["phase"], words["step"], words["call"]) == ("generator 1", "generating", 3, "write")
    assert words["doing"] == ["generating"] and words["pid"] == os.getpid()


def test_a_phase_does_not_end_before_its_strike_has_fallen(striker, tmp_path):
    striker.rounds = 2
    over = threading.Event()
    waits = threading.Thread(target=lambda: (striker.hold("generating"), over.set()))
    waits.start()
    assert not over.wait(0.1)
    victim = subprocess.Popen(["sleep", "100"])
    try:
        (tmp_path / "struck" / "a").write_text(str(victim.pid))
        assert not over.wait(0.1), "it is announced, and the signal is still to come"
        victim.send_signal(signal.SIGSTOP)
        assert over.wait(10)
    finally:
        victim.kill()
        victim.wait()
    striker.hold("generating")  # nothing is left of it
    striker.hold("scoring")  # nothing is planned there
