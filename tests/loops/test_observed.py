"""A whole run that others watch, on a simulated clock."""

import json

import pytest

from rlhf_ray.start.rl import run_rl

pytestmark = pytest.mark.slow


def test_a_run_is_watched_and_no_watcher_stops_it(tiny_config, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def write(record):\n"
        f"    with open({str(tmp_path / 'heard.jsonl')!r}, 'a') as file:\n"
        "        print(json.dumps({**record.metrics, 'step': record.step, 'of': record.steps,\n"
        "                          'texts': len(record.samples)}), file=file)\n"
    )
    seconds = [0.0]

    def clock() -> float:  # a second a reading
        seconds[0] += 1
        return seconds[0]

    def fails_at_1(record) -> None:
        assert record.step > 1, "not this early"

    heard = []
    settings = ("steps=2", "eval.size=2", f"logging.observers=[{tmp_path}/mine.py:write]")
    run_rl(tiny_config(*settings), tmp_path / "run", observers=[fails_at_1, heard.append], clock=clock)

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    assert [row.pop("of") for row in written] == [2, 2] and min(row.pop("texts") for row in written) > 0
    assert written == rows, "an observer of the config hears what metrics.jsonl holds"
    assert [record.step for record in heard] == [1, 2]
    times = [value for row in rows for name, value in row.items() if name.startswith("time/")]
    assert all(value == int(value) for value in times) and sum(times) > 10, "no part of the run takes another clock"
    assert rows[1]["cost/hours"] * 3600 == pytest.approx(round(rows[1]["cost/hours"] * 3600), abs=1e-9)

    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (alarm,) = [event for event in events if event["event"] == "alarm"]
    assert (alarm["kind"], alarm["step"]) == ("observer_failed", 1)
    assert "fails_at_1 is switched off, the run goes on (AssertionError: not this early" in alarm["reason"]
    assert "ALARM step 1: observer_failed: " in capsys.readouterr().out
