"""The first signal is remembered until the step has ended, the second is not."""

import signal
import threading

import pytest

from rlhf_ray.errors import Terminated
from rlhf_ray.run.stopping import Stop, terminated


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, terminated)  # as the command line does
    yield Stop()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_the_step_ends_first(stop, capfd, number, kind):
    stop.listen()
    assert not stop.heed()
    stop.go()
    signal.raise_signal(number)
    assert stop.heed() and "stopping after this step, with a checkpoint" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt) as raised:
        stop.go()
    assert raised.type is kind
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_ends_it_at_once(stop, second):
    stop.listen()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(second)
        pytest.fail("the step went on")


def test_afterwards_signals_do_what_they_did(stop):
    stop.listen()
    stop.forget()
    stop.forget()
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    assert not stop.requested


def test_a_handler_of_somebody_elses_stays(stop):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    stop.listen()
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM] and not stop.requested
    stop.forget()


def test_in_another_thread_nobody_listens(stop):
    thread = threading.Thread(target=stop.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is terminated
