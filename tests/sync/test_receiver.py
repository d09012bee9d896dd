"""The receiver's state machine, without tensors."""

from __future__ import annotations

import pytest

from rlhf_ray.errors import SyncError
from rlhf_ray.sync.receiver import SyncSession


def bucket(index, last, *names):
    return {"names": list(names), "index": index, "last": last}


def run(session, version, *buckets):
    session.start()
    for each in buckets:
        session.receive(each)
    session.check_complete()
    session.finish(version)


def test_versions_are_the_senders_or_count_by_themselves():
    session = SyncSession("g")
    assert session.version == 0
    run(session, "7", bucket(0, False, "a"), bucket(1, True, "b"))
    assert session.version == 7
    run(session, None, bucket(0, True, "a", "b"))
    assert session.version == 8


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([bucket(1, True, "a")], "bucket 1 arrived where bucket 0 was due"),
        ([bucket(0, True, "a"), bucket(1, True, "b")], "bucket 1 arrived"),  # after the last
        ([bucket(0, False, "a"), bucket(1, True, "a")], "came twice"),
        ([bucket(0, True, "a", "a")], "came twice"),
        ([bucket(0, False, "a")], "before its last one"),
        ([], "before its last one"),
    ],
)
def test_holes_and_repeats_break_it_for_good(buckets, message):
    session = SyncSession("generator 3")
    with pytest.raises(SyncError, match=message):
        run(session, "1", *buckets)
    assert session.state == "broken" and session.version == 0
    with pytest.raises(SyncError, match="generator 3: cannot generate.*replace this generator"):
        session.require_whole("generate")
    with pytest.raises(SyncError):
        session.start()


def test_update_that_was_cut_off_is_found_at_the_next_use():
    session = SyncSession("g")
    session.start()
    session.receive(bucket(0, False, "a"))
    with pytest.raises(SyncError, match="cannot generate.*cut off half-way"):
        session.require_whole("generate")
    assert session.state == "broken"


def test_other_names_than_the_last_time_are_refused():
    session = SyncSession("g")
    run(session, "1", bucket(0, True, "a", "b"))
    with pytest.raises(SyncError, match=r"missing \['b'\], new \['c'\]"):
        run(session, "2", bucket(0, True, "a", "c"))


def test_transports_without_bucket_numbers():
    session = SyncSession("g")
    run(session, "1", {"names": ["a"]}, {"names": ["b"]})
    assert session.version == 1


def test_calls_out_of_order():
    with pytest.raises(SyncError, match="outside of an update"):
        SyncSession("g").receive(bucket(0, True, "a"))
    with pytest.raises(SyncError, match="outside of an update"):
        SyncSession("g").check_complete()
    session = SyncSession("g")
    session.start()
    session.receive(bucket(0, True, "a"))
    with pytest.raises(SyncError, match="not a number"):
        session.finish("new")


def test_an_update_whose_sender_was_lost_is_begun_again():
    session = SyncSession("g")
    session.start()
    session.receive(bucket(0, False, "a"))
    run(session, "1", bucket(0, False, "a"), bucket(1, True, "b"))
    assert session.version == 1 and session.state == "ready"
    session.start()
    session.receive(bucket(0, False, "a"))
    session.start()
    with pytest.raises(SyncError, match="bucket 1 arrived where bucket 0 was due"):
        session.receive(bucket(1, True, "b"))  # the rest of the one before
