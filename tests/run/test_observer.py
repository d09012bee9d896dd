"""Who is told of a run's steps."""

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.run.observer import Alarm, Observer, Observers, StepRecord, find_observer

RECORD = StepRecord(3, 10, {"reward/mean": 0.5})


class Listener(Observer):
    def __init__(self):
        self.heard = []

    def step(self, record):
        self.heard.append(record)

    def alarm(self, alarm):
        self.heard.append(alarm)

    def note(self, text):
        self.heard.append(text)

    def close(self):
        self.heard.append("closed")


class Broken(Observer):
    def step(self, record):
        raise KeyError("reward/total")


class NeedsMore(Observer):
    def __init__(self, path):
        self.path = path


def test_all_are_told_in_order():
    heard, listener = [], Listener()
    observers = Observers([find_observer(heard.append)(), find_observer(listener)()])
    observers.note("loading")
    observers.step(RECORD)
    alarm = Alarm("mismatch", "the weights differ", 3)
    observers.alarm(alarm)
    observers.close()
    assert heard == [RECORD], "a function is given steps, and nothing else"
    assert listener.heard == ["loading", RECORD, alarm, "closed"]


def test_one_that_fails_is_switched_off_with_an_alarm_and_the_others_go_on():
    before, after = Listener(), Listener()
    observers = Observers([before, Broken(), after])
    observers.step(RECORD)
    observers.step(RECORD)
    (alarm,) = [heard for heard in before.heard if isinstance(heard, Alarm)]
    assert (alarm.kind, alarm.step) == ("observer_failed", 3)
    assert alarm.reason.startswith("Broken is switched off, the run goes on (KeyError: 'reward/total')\n")
    assert 'test_observer.py' in alarm.reason and 'raise KeyError("reward/total")' in alarm.reason
    assert after.heard == [alarm, RECORD, RECORD]


def test_one_that_fails_when_it_hears_of_another_ends_nothing():
    class Nervous(Observer):
        def alarm(self, alarm):
            raise RuntimeError("no screen")

    listener = Listener()
    observers = Observers([Broken(), Nervous(), listener], steps_done=7)
    observers.step(RECORD)
    assert sorted(heard.reason.split()[0].split(".")[-1] for heard in listener.heard[:2]) == ["Broken", "Nervous"]
    assert listener.heard[2] == RECORD
    observers.close()


def test_ctrl_c_is_no_failure():
    def interrupted(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers([find_observer(interrupted)()]).step(RECORD)


def test_an_observer_cannot_change_what_the_next_is_given():
    metrics = {"reward/mean": 0.5}
    record = StepRecord(1, 2, metrics)
    with pytest.raises(TypeError, match="does not support item assignment"):
        record.metrics["reward/mean"] = 1.0
    metrics["reward/mean"] = 1.0
    assert record.metrics["reward/mean"] == 0.5


def test_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rlhf_ray.run.observer import Observer\nheard = []\n"
        "def listen(record): heard.append(record.step)\n"
        "class Kept(Observer):\n    def step(self, record): heard.append(-record.step)\n"
        "two = lambda step, metrics: None\nnumber = 3\n"
    )
    observers = Observers([find_observer(f"{tmp_path}/mine.py:{name}")() for name in ("listen", "Kept")])
    observers.step(RECORD)
    function = find_observer(f"{tmp_path}/mine.py:listen")().function
    assert function.__globals__["heard"] == [3, -3]
    with pytest.raises(ConfigError, match=r"mine.py:two is called as f\(record\), and it has missing a required"):
        find_observer(f"{tmp_path}/mine.py:two")
    with pytest.raises(ConfigError, match=r"mine.py:number is 3; give a function f\(record\), or a subclass of"):
        find_observer(f"{tmp_path}/mine.py:number")
    with pytest.raises(ConfigError, match=r"has no 'lisen'; did you mean 'listen'\?"):
        find_observer(f"{tmp_path}/mine.py:lisen")
    with pytest.raises(ConfigError, match="observer file missing.py does not exist; give the path of a .py file"):
        find_observer("missing.py:f")


def test_a_class_that_needs_arguments():
    make = find_observer(NeedsMore)
    with pytest.raises(ConfigError, match=r"observer NeedsMore cannot be made, without arguments \(TypeError: .*path"):
        make()
