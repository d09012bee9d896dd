"""The benchmark of seconds: it measures whole processes, and its busy loops end."""

from __future__ import annotations

import sys

import pytest

from benchmarks import seconds


def test_it_prints_a_line_for_each_name_and_the_ratio(monkeypatch, capsys):
    monkeypatch.setattr(seconds, "MEASUREMENTS", {
        "quickstart": ("idle", lambda: 2.0), "busy": ("busy", lambda: 3.0), "other": ("not asked for", lambda: 1 / 0),
    })  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["seconds.py", "quickstart", "busy"])
    seconds.main()
    idle, busy, ratio = capsys.readouterr().out.splitlines()
    assert idle.split() == ["2.00", "s", "idle"] and busy.split() == ["3.00", "s", "busy"]
    assert ratio.split()[0] == "1.50"


def test_an_unknown_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["seconds.py", "quick"])
    with pytest.raises(SystemExit):
        seconds.main()
    assert "unknown: quick; choose from import, help" in capsys.readouterr().err


def test_a_process_that_fails_is_no_measurement():
    assert seconds.run("-c", "pass") > 0
    with pytest.raises(SystemExit, match="(?s)failed.*no good"):
        seconds.run("-c", "raise SystemExit('no good')")


def test_busy_loops_end(monkeypatch):
    started = []
    popen = seconds.subprocess.Popen
    monkeypatch.setattr(seconds.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with seconds.busy_cores():
        assert started and all(loop.poll() is None for loop in started)
    assert all(loop.poll() is not None for loop in started)
